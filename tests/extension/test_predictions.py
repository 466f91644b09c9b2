"""The seam of the WebUI and of Forge without a host: what is judged, what is replaced, and that nothing is left behind."""

import contextlib
import copy
import importlib
import math
import random
import sys
import types

import pytest
import torch

CFG = 7.5


@pytest.fixture
def modules(monkeypatch):
    """As much of the host's ``modules`` as the seam asks for: its callbacks and options."""
    callbacks = types.ModuleType("modules.script_callbacks")
    callbacks.lists = {"cfg_denoiser": [], "cfg_denoised": []}
    callbacks.on_cfg_denoiser = callbacks.lists["cfg_denoiser"].append
    callbacks.on_cfg_denoised = callbacks.lists["cfg_denoised"].append

    def remove_callbacks_for_function(function):
        for registered in callbacks.lists.values():
            registered[:] = [each for each in registered if each != function]

    callbacks.remove_callbacks_for_function = remove_callbacks_for_function
    shared = types.ModuleType("modules.shared")
    shared.opts = types.SimpleNamespace(skip_early_cond=0.0, pad_cond_uncond=False, pad_cond_uncond_v0=False)
    shared.sd_model = types.SimpleNamespace(model=types.SimpleNamespace(conditioning_key="crossattn"))
    package = types.ModuleType("modules")
    package.script_callbacks, package.shared = callbacks, shared
    package.devices, package.prompt_parser = types.ModuleType("modules.devices"), types.ModuleType("modules.prompt_parser")
    for module in (package, callbacks, shared, package.devices, package.prompt_parser):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def beside(module, name):
    """Another module of the extension that was loaded with this one."""
    return importlib.import_module(f".{name}", module.__package__)


@pytest.fixture
def predictions(load_extension, modules):
    return load_extension("predictions")


class Monitor:
    """Says what it was given, and gives what it is told to: ``None`` for the conditional prediction itself."""

    def __init__(self, corrected=None, prediction_type="epsilon"):
        self.corrected, self.seen, self.errors = corrected, [], []
        self.settings = types.SimpleNamespace(prediction_type=prediction_type)

    def predicted(self, x, sigma, cond, uncond, *, ask, prompts):
        self.ask, self.prompts = ask, prompts
        self.seen.append((x, sigma, cond.clone(), None if uncond is None else uncond.clone()))
        return cond if self.corrected is None else self.corrected(cond)

    def fail(self, error):
        self.errors.append(error)


def latents(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Denoiser:
    """As the WebUI's ``CFGDenoiser`` treats its rows; its network's answer is given."""

    def __init__(self, modules, weights, rows, s_min_uncond=0.0):
        batch = [[types.SimpleNamespace(weight=weight) for weight in each] for each in weights]
        arguments = {"cond": types.SimpleNamespace(batch=batch), "s_min_uncond": s_min_uncond}
        self.sampler = types.SimpleNamespace(sampler_extra_args=arguments)
        self.modules, self.weights, self.rows = modules, weights, rows

    def __call__(self, x, sigma, skip=False):
        callbacks = self.modules.script_callbacks.lists
        repeats = [len(each) for each in self.weights]
        x_in = torch.cat([x.repeat_interleave(torch.tensor(repeats), 0), x])
        sigma_in = torch.cat([sigma.repeat_interleave(torch.tensor(repeats)), sigma])
        params = types.SimpleNamespace(x=x_in, sigma=sigma_in, text_cond=torch.zeros(sum(repeats), 2, 3), denoiser=self)
        for callback in callbacks["cfg_denoiser"]:
            callback(params)
        out = self.rows.clone()
        if skip:
            firsts = [sum(repeats[:i]) for i in range(len(repeats))]
            out = torch.cat([out[: sum(repeats)], out[firsts]])
        for callback in callbacks["cfg_denoised"]:
            callback(types.SimpleNamespace(x=out))
        self.out = out
        return self.combine(out, 1.0 if skip else CFG)

    def combine(self, rows, scale):
        without = rows[-len(self.weights) :]
        denoised, index = without.clone(), 0
        for i, each in enumerate(self.weights):
            for weight in each:
                denoised[i] += (rows[index] - without[i]) * (weight * scale)
                index += 1
        return denoised


X, SIGMA = latents(2, 9), torch.tensor([3.0, 3.0])
ONE_EACH, JOINED = [[1.0], [1.0]], [[1.0, 0.5], [0.25, -0.5, 1.5]]


@pytest.mark.parametrize("weights", [ONE_EACH, JOINED, [[0.5], [1.0]]], ids=str)
def test_what_is_only_judged_keeps_every_bit(modules, predictions, weights):
    rows, monitor = latents(sum(map(len, weights)) + 2), Monitor()
    denoiser = Denoiser(modules, weights, rows)
    plain = denoiser(X, SIGMA)
    with predictions.judged(denoiser, monitor, monitor.predicted):
        assert torch.equal(denoiser(X, SIGMA), plain)
    assert torch.equal(denoiser.out, rows)
    ((x, sigma, cond, uncond),) = monitor.seen
    assert torch.equal(x, X)
    assert torch.equal(sigma, SIGMA)
    assert torch.equal(uncond, rows[-2:])
    assert torch.allclose(uncond + CFG * (cond - uncond), plain, atol=1e-4)
    assert monitor.errors == []
    assert all(registered == [] for registered in modules.script_callbacks.lists.values())


@pytest.mark.parametrize("weights", [ONE_EACH, JOINED, [[0.5], [1.0]], [[0.0, 2.0], [1.0]]], ids=str)
def test_what_is_corrected_is_what_guidance_goes_on_from(modules, predictions, weights):
    rows, other = latents(sum(map(len, weights)) + 2), latents(1, 5)[0]

    def corrected(cond):
        return torch.stack([cond[0], other])

    monitor = Monitor(corrected)
    denoiser = Denoiser(modules, weights, rows)
    plain = denoiser(X, SIGMA)
    with predictions.judged(denoiser, monitor, monitor.predicted):
        given = denoiser(X, SIGMA)
    assert torch.equal(given[0], plain[0])
    without = rows[-1]
    assert torch.allclose(given[1], without + CFG * (other - without), atol=1e-4)
    assert torch.equal(denoiser.out[-2:], rows[-2:])


@pytest.mark.parametrize("weights", [ONE_EACH, JOINED], ids=str)
@pytest.mark.parametrize("option", ["skip_early_cond", "s_min_uncond"])
def test_where_the_host_leaves_the_unconditional_prediction_out_the_other_is_judged_alone(
    modules, predictions, weights, option
):
    rows, other = latents(sum(map(len, weights)) + 2), latents(2, 5)
    denoiser = Denoiser(modules, weights, rows, s_min_uncond=3.0 if option == "s_min_uncond" else 0.0)
    modules.shared.opts.skip_early_cond = 0.3 if option == "skip_early_cond" else 0.0
    plain = denoiser(X, SIGMA, skip=True)
    for corrected in (None, lambda cond: other):
        monitor = Monitor(corrected)
        with predictions.judged(denoiser, monitor, monitor.predicted):
            given = denoiser(X, SIGMA, skip=True)
            denoiser(X, SIGMA)
        (_, _, cond, uncond), (*_, evaluated) = monitor.seen
        assert uncond is None
        assert torch.allclose(cond, plain, atol=1e-4)
        assert evaluated is not None
        assert torch.equal(given, plain) if corrected is None else torch.allclose(given, other, atol=1e-4)


def test_a_model_that_edits_images_is_judged_by_its_predictions_with_the_image(modules, predictions):
    rows, monitor = latents(6), Monitor()
    denoiser = Denoiser(modules, ONE_EACH, rows)
    with predictions.judged(denoiser, monitor, monitor.predicted):
        denoiser(X, SIGMA)
    ((_, _, cond, uncond),) = monitor.seen
    assert torch.equal(cond, rows[:2])
    assert torch.equal(uncond, rows[2:4])


def test_other_extensions_have_their_say_first_and_other_denoisers_are_left_alone(modules, predictions):
    rows, monitor, exchanged = latents(4), Monitor(), latents(4, 3)
    denoiser, other = Denoiser(modules, ONE_EACH, rows), Denoiser(modules, ONE_EACH, rows)
    lists = modules.script_callbacks.lists

    def noisier(params):
        params.x = exchanged

    def doubled(params):
        params.x *= 2

    with predictions.judged(denoiser, monitor, monitor.predicted):
        lists["cfg_denoiser"].append(noisier)  # called after ours
        lists["cfg_denoised"].insert(0, doubled)
        denoiser(X, SIGMA)
        other(X, SIGMA)
    ((x, _, cond, _),) = monitor.seen
    assert torch.equal(x, exchanged[-2:])
    assert torch.equal(cond, 2 * rows[:2])
    assert lists == {"cfg_denoiser": [noisier], "cfg_denoised": [doubled]}


def test_an_error_of_ours_costs_no_image(modules, predictions):
    rows, monitor = latents(4), Monitor()
    denoiser = Denoiser(modules, ONE_EACH, rows)

    def broken(*_, **__):
        raise ZeroDivisionError

    with predictions.judged(denoiser, monitor, broken):
        assert torch.isfinite(denoiser(X, SIGMA)).all()
    assert [type(error) for error in monitor.errors] == [ZeroDivisionError]


class Network(torch.nn.Module):
    """A network as the WebUI wraps it: what it says depends on everything that it is given, and on nothing else."""

    def __init__(self, sigmas=None):
        super().__init__()
        if sigmas is not None:
            self.sigmas = sigmas
        self.inner_model = types.SimpleNamespace(alphas_cumprod=torch.linspace(0.999, 0.005, 1000))
        self.calls = []

    def forward(self, x, sigma, cond):
        self.calls.append(sorted(cond))
        text = cond.get("crossattn", cond.get("c_crossattn"))
        text = text[0] if isinstance(text, list) else text
        (image,) = cond["c_concat"] if "c_concat" in cond else (cond["c_adm"],)
        assert len(x) == len(sigma) == len(text) == len(image)
        per_image = text.mean((1, 2)) + cond.get("vector", torch.zeros(len(x), 1)).mean(1) + sigma
        return torch.tanh(x) * per_image.view(-1, 1, 1, 1) + 2 * image


class Given:
    """As much of the host's ``CFGDenoiserParams`` as the network is asked with; prompts and negative differ in length."""

    def __init__(self, weights, texts=dict, longer=0):
        count, rows = sum(map(len, weights)), sum(map(len, weights)) + len(weights)
        generator = torch.Generator().manual_seed(3)
        self.x, self.sigma = torch.zeros(rows, 4, 8, 8), torch.full((rows,), 3.0)
        self.image_cond = torch.randn(rows, 4, 1, 1, generator=generator)
        self.text_cond, self.text_uncond = (
            self._texts(texts, number, length, generator) for number, length in ((count, 6), (len(weights), 6 + longer))
        )

    @staticmethod
    def _texts(texts, number, length, generator):
        tokens, vector = torch.randn(number, length, 5, generator=generator), torch.randn(number, 7, generator=generator)
        if texts is torch.Tensor:
            return tokens

        class DictWithShape(dict):
            shape = tokens.shape

        return DictWithShape(crossattn=tokens, vector=vector)

    def row(self, network, number, latent, level, key="c_concat"):
        """What the network says of one row by itself."""
        count = len(self.x) - len(self.text_uncond)
        texts, place = (self.text_cond, number) if number < count else (self.text_uncond, number - count)
        image, sigma = self.image_cond[number : number + 1], torch.tensor([level])
        if isinstance(texts, dict):
            cond = {name: rows[place : place + 1] for name, rows in texts.items()}
        else:
            cond = {"c_crossattn": [texts[place : place + 1]]}
        return network(latent[None], sigma, {**cond, key: image if key == "c_adm" else [image]})[0]


@pytest.mark.parametrize("weights", [ONE_EACH, JOINED, [[0.5], [1.0]]], ids=str)
@pytest.mark.parametrize("texts", [dict, torch.Tensor])
@pytest.mark.parametrize("longer", [0, 6])
@pytest.mark.parametrize("sigmas", [torch.tensor([0.03, 14.6]), None], ids=["sigmas", "timesteps"])
def test_the_network_is_asked_about_noise_for_every_row(modules, predictions, weights, texts, longer, sigmas):
    rows, monitor = latents(sum(map(len, weights)) + 2), Monitor()
    denoiser = Denoiser(modules, weights, rows)
    denoiser.inner_model, given = Network(sigmas), Given(weights, texts, longer)
    with predictions.judged(denoiser, monitor, monitor.predicted):
        (before,) = modules.script_callbacks.lists["cfg_denoiser"]
        (after,) = modules.script_callbacks.lists["cfg_denoised"]
        given.denoiser = denoiser
        before(given)
        after(types.SimpleNamespace(x=rows))
        noise = latents(2, 4)
        asked, own, alone = monitor.ask(noise), monitor.ask(None), monitor.ask(noise, alone=True)
    assert monitor.errors == []
    # One prompt at its full weight needs no other prediction; where weights are given, it has a part.
    assert (alone[3] is None) == (weights == ONE_EACH)
    assert torch.allclose(alone[2], asked[2], atol=1e-5)
    assert torch.equal(own[0], given.x[-2:])
    assert own[1] == 3.0
    latent, level, *_ = asked
    assert level == (999.0 if sigmas is None else pytest.approx(14.6))
    # Its network is given just this noise, on the VP scale, in either case.
    assert torch.allclose(latent, noise if sigmas is None else noise * math.hypot(1, level))
    for latent, level, cond, uncond in (asked, own):
        row, number = iter(range(len(given.x))), Network()
        said = [[given.row(number, next(row), latent[image], level) for _ in each] for image, each in enumerate(weights)]
        without = [given.row(number, next(row), latent[image], level) for image in range(2)]
        assert torch.allclose(uncond, torch.stack(without), atol=1e-4)
        expected = [
            alone + sum(weight * (one - alone) for weight, one in zip(each, prompts, strict=True))
            for each, prompts, alone in zip(weights, said, without, strict=True)
        ]
        assert torch.allclose(cond, torch.stack(expected), atol=1e-4)


def test_a_model_that_is_given_an_embedding_of_an_image_is_asked_with_it(modules, predictions):
    modules.shared.sd_model.model.conditioning_key = "crossattn-adm"
    denoiser, monitor = Denoiser(modules, ONE_EACH, latents(4)), Monitor()
    denoiser.inner_model, given = Network(torch.tensor([14.6])), Given(ONE_EACH, torch.Tensor)
    predictions._judge_rows(denoiser, monitor, monitor.predicted, given, denoiser.rows, predictions.Texts(denoiser))
    latent, level, cond, uncond = monitor.ask(latents(2, 4))
    assert denoiser.inner_model.calls == [["c_adm", "c_crossattn"]] * 2
    for number, said in enumerate((*cond, *uncond)):
        assert torch.allclose(given.row(Network(), number, latent[number % 2], level, "c_adm"), said, atol=1e-4)


def test_a_flow_model_is_asked_about_noise_alone(modules, predictions):
    denoiser, monitor = Denoiser(modules, ONE_EACH, latents(4)), Monitor(prediction_type="flow_prediction")
    denoiser.inner_model = Network(torch.tensor([0.1, 1.0]))
    predictions._judge_rows(denoiser, monitor, monitor.predicted, Given(ONE_EACH), denoiser.rows, predictions.Texts(denoiser))
    noise = latents(2, 4)
    latent, level, *_ = monitor.ask(noise)
    assert torch.equal(latent, noise)
    assert level == 1.0


@pytest.mark.parametrize("option", ["pad_cond_uncond", "pad_cond_uncond_v0"])
def test_prompts_are_padded_as_the_host_pads_them(modules, predictions, option):
    setattr(modules.shared.opts, option, True)
    denoiser, monitor = Denoiser(modules, ONE_EACH, latents(4)), Monitor()
    denoiser.inner_model, given = Network(torch.tensor([14.6])), Given(ONE_EACH, longer=6)
    padded = Given(ONE_EACH)
    setattr(denoiser, option, lambda cond, uncond: (padded.text_cond, padded.text_uncond))
    predictions._judge_rows(denoiser, monitor, monitor.predicted, given, denoiser.rows, predictions.Texts(denoiser))
    padded.image_cond = given.image_cond
    latent, level, cond, uncond = monitor.ask(latents(2, 4))
    for number, said in enumerate((*cond, *uncond)):
        assert torch.allclose(padded.row(Network(), number, latent[number % 2], level), said, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_what_hypertile_draws_is_drawn_again(modules, predictions, monkeypatch, fails):
    tiling = types.ModuleType("hypertile")
    tiling.RNG_INSTANCE = random.Random(5)
    monkeypatch.setitem(sys.modules, "hypertile", tiling)
    expected = random.Random(5).random()
    with contextlib.suppress(ZeroDivisionError), beside(predictions, "calls").tiling_kept():
        tiling.RNG_INSTANCE.random()
        if fails:
            raise ZeroDivisionError
    assert tiling.RNG_INSTANCE.random() == expected


# ----------------------------------------------------------------------------------------------------------------- Forge


class Unet:
    """As much of Forge's patcher as the seam asks for."""

    def __init__(self, options=None, lora_loader=True):
        self.model_options = options or {}
        if lora_loader:
            self.lora_loader = object()

    def clone(self):
        return Unet(copy.deepcopy(self.model_options), hasattr(self, "lora_loader"))


class ForgeDenoiser:
    """As Forge's denoiser samples: ``sampling_function_inner``, with the network's answers given."""

    def __init__(self, modules, unet, cond, uncond, weights=(1.0,)):
        objects = types.SimpleNamespace(unet=unet)
        model = types.SimpleNamespace(forge_objects=objects)
        self.inner_model = types.SimpleNamespace(inner_model=model)
        self.modules, self.objects, self.answers, self.weights = modules, objects, (cond, uncond), weights

    def __call__(self, x, sigma, cond_scale=CFG):
        for callback in self.modules.script_callbacks.lists["cfg_denoiser"]:
            callback(types.SimpleNamespace(x=x, sigma=sigma, text_cond=torch.zeros(len(x), 2, 3), denoiser=self))
        options = self.objects.unet.model_options
        cond, uncond = [{"strength": weight} for weight in self.weights], [{}]
        edit_strength = sum(each["strength"] for each in cond)
        uncond_ = None if math.isclose(cond_scale, 1.0) else uncond
        for function in options.get("sampler_pre_cfg_function", []):
            _, cond, uncond_, x, sigma, options = function(None, cond, uncond_, x, sigma, options)
        cond_pred, uncond_pred = (each.clone() for each in self.answers)
        if uncond_ is None:
            uncond_pred = torch.zeros_like(uncond_pred)
        if "sampler_cfg_function" in options:
            args = {"cond": x - cond_pred, "uncond": x - uncond_pred, "cond_scale": cond_scale, "input": x, "sigma": sigma}
            result = x - options["sampler_cfg_function"]({**args, "cond_denoised": cond_pred, "uncond_denoised": uncond_pred})
        elif not math.isclose(edit_strength, 1.0):
            result = uncond_pred + (cond_pred - uncond_pred) * cond_scale * edit_strength
        else:
            result = uncond_pred + (cond_pred - uncond_pred) * cond_scale
        self.last = cond_pred, uncond_pred
        return result


@pytest.fixture
def forge(modules, predictions, monkeypatch):
    monkeypatch.setattr(sys.modules[predictions.hosts.__name__], "HAS_UNET_PATCHER", True)
    return modules


def halved(args):
    """Somebody else's CFG function."""
    return 0.5 * (args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"])


@pytest.mark.parametrize("scale", [CFG, 1.0])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5), (1.0, -1.0)], ids=str)
@pytest.mark.parametrize("chosen", [None, halved])
def test_forge_what_is_only_judged_keeps_every_bit(forge, predictions, scale, weights, chosen):
    cond, uncond, monitor = latents(2, 1), latents(2, 2), Monitor()
    unet = Unet({} if chosen is None else {"sampler_cfg_function": chosen})
    denoiser = ForgeDenoiser(forge, unet, cond, uncond, weights)
    plain = denoiser(X, SIGMA, scale)
    with predictions.judged(denoiser, monitor, monitor.predicted):
        assert torch.equal(denoiser(X, SIGMA, scale), plain)
        assert torch.equal(denoiser(X, SIGMA, scale), plain)
        assert denoiser.objects.unet is not unet
    assert denoiser.objects.unet is unet
    assert unet.model_options == ({} if chosen is None else {"sampler_cfg_function": chosen})
    assert forge.script_callbacks.lists["cfg_denoiser"] == []
    assert len(monitor.seen) == 2
    x, sigma, judged, without = monitor.seen[0]
    assert torch.equal(x, X)
    assert torch.equal(sigma, SIGMA)
    if scale == 1.0:
        assert torch.equal(judged, cond)
        assert without is None
    else:
        weight = sum(weights) or 1.0
        assert torch.allclose(judged, uncond + weight * (cond - uncond), atol=1e-5)
        assert torch.equal(without, uncond)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5)], ids=str)
@pytest.mark.parametrize("chosen", [None, halved])
def test_forge_what_is_corrected_is_what_guidance_goes_on_from(forge, predictions, weights, chosen):
    cond, uncond, other = latents(2, 1), latents(2, 2), latents(1, 5)[0]
    options = {} if chosen is None else {"sampler_cfg_function": chosen}
    denoiser = ForgeDenoiser(forge, Unet(options), cond, uncond, weights)
    plain = denoiser(X, SIGMA)
    monitor = Monitor(lambda cond: torch.stack([cond[0], other]))
    with predictions.judged(denoiser, monitor, monitor.predicted):
        given = denoiser(X, SIGMA)
    assert torch.equal(given[0], plain[0])
    # Guidance of Forge ignores the weights where somebody has put a function of theirs in.
    target = other if chosen is None or weights == (1.0,) else uncond[1] + (other - uncond[1]) / sum(weights)
    expected = uncond[1] + CFG * (target - uncond[1])
    expected = expected if chosen is None else 0.5 * (X[1] + expected)
    assert torch.allclose(given[1], expected, atol=1e-4)
    # What post-CFG functions see, such as perturbed attention's.
    assert torch.equal(denoiser.last[1], uncond)
    assert torch.equal(denoiser.last[0][0], cond[0])
    assert torch.allclose(uncond[1] + sum(weights) * (denoiser.last[0][1] - uncond[1]), other, atol=1e-5)


def test_forge_a_patcher_that_is_cloned_or_exchanged_in_the_middle_stays_guarded(forge, predictions):
    monitor = Monitor()
    denoiser = ForgeDenoiser(forge, Unet(), latents(2, 1), latents(2, 2))
    with predictions.judged(denoiser, monitor, monitor.predicted):
        denoiser(X, SIGMA)
        denoiser.objects.unet = denoiser.objects.unet.clone()
        denoiser(X, SIGMA)
        refiner = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=Unet()))
        own = refiner.forge_objects.unet
        denoiser.inner_model.inner_model, denoiser.objects = refiner, refiner.forge_objects
        denoiser(X, SIGMA)
    assert len(monitor.seen) == 3
    assert refiner.forge_objects.unet is own


def test_reforge_the_predictions_are_judged_before_what_others_make_of_them(forge, predictions):
    cond, uncond, other = latents(2, 1), latents(2, 2), latents(2, 5)
    monitor = Monitor(lambda cond: other)
    unet = Unet({"sampler_pre_cfg_function": [lambda args: [2 * each for each in args["conds_out"]]]}, lora_loader=False)
    denoiser = ForgeDenoiser(forge, unet, cond, uncond)
    with predictions.judged(denoiser, monitor, monitor.predicted):
        for callback in forge.script_callbacks.lists["cfg_denoiser"]:
            callback(types.SimpleNamespace(x=X, sigma=SIGMA, denoiser=denoiser))
        for conds in ([[{}], [{}]], [[{}], None]):
            out = [cond.clone(), uncond.clone()]
            for function in denoiser.objects.unet.model_options["sampler_pre_cfg_function"]:
                out = function({"conds": conds, "conds_out": out, "input": X, "sigma": SIGMA, "cond_scale": CFG})
            assert torch.equal(out[0], 2 * other)
            assert torch.equal(out[1], 2 * uncond)
    assert [without is None for *_, without in monitor.seen] == [False, True]
    assert torch.equal(monitor.seen[0][2], cond)


HIGHEST = 14.6


def conditioned(model, cond, uncond, x, timestep, options):
    """As the function of Forge and of reForge that evaluates the network."""
    assert options["transformer_options"] == "kept"
    assert torch.equal(timestep, torch.full((2,), HIGHEST))
    return torch.tanh(x) + cond[0]["strength"], torch.zeros_like(x) if uncond is None else -torch.tanh(x)


def asked_in(monitor, weight, guided):
    """Checks what the network was asked in Forge or reForge."""
    noise = latents(2, 4)
    latent, level, cond, uncond = monitor.ask(noise)
    alone = monitor.ask(noise, alone=True)
    assert torch.equal(alone[2], cond)
    assert (alone[3] is None) == (not guided or weight == 1.0)
    assert level == pytest.approx(HIGHEST)
    assert torch.allclose(latent, noise * math.hypot(1, HIGHEST))
    said, without = torch.tanh(latent) + weight, -torch.tanh(latent)
    assert (uncond is None) == (not guided)
    if guided:
        assert torch.equal(uncond, without)
        said = without + weight * (said - without)
    assert torch.allclose(cond, said, atol=1e-5)


@pytest.fixture
def model(monkeypatch):
    """Gives a model of Forge or of reForge, with the host's module that evaluates it."""

    def new(host):
        name = {"forge": "backend.sampling.sampling_function", "reforge": "ldm_patched.modules.samplers"}[host]
        module = types.ModuleType(name)
        module.calc_cond_uncond_batch = conditioned
        for part in ("backend", "backend.sampling", "ldm_patched", "ldm_patched.modules"):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setitem(sys.modules, name, module)
        scale = types.SimpleNamespace(sigma_max=torch.tensor(HIGHEST))
        return types.SimpleNamespace(**{"predictor" if host == "forge" else "model_sampling": scale})

    return new


OPTIONS = {"transformer_options": "kept"}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_forge_the_network_is_asked_with_the_prompts_and_options_of_the_run(forge, predictions, model, weight, guided):
    monitor, network = Monitor(), model("forge")
    conds = [{"strength": weight}], [{}] if guided else None
    before_network = beside(predictions, "forge")._last_before_guidance(monitor, monitor.predicted, predictions.Texts(None))
    *_, options = before_network(network, *conds, X, SIGMA, OPTIONS)
    args = {"input": X, "sigma": SIGMA, "cond_scale": CFG, "model": network, "model_options": options}
    options["sampler_cfg_function"]({**args, "cond_denoised": latents(2, 1), "uncond_denoised": latents(2, 2)})
    assert monitor.errors == []
    asked_in(monitor, weight, guided)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_reforge_the_network_is_asked_with_the_prompts_and_options_of_the_run(forge, predictions, model, weight, guided):
    monitor, network = Monitor(), model("reforge")
    conds = [[{"strength": weight}], [{}] if guided else None]
    args = {"conds": conds, "conds_out": [latents(2, 1), latents(2, 2)], "input": X, "sigma": SIGMA, "cond_scale": CFG}
    after_network = beside(predictions, "forge")._first_after_network(monitor, monitor.predicted, predictions.Texts(None))
    after_network({**args, "model": network, "model_options": OPTIONS})
    assert monitor.errors == []
    asked_in(monitor, weight, guided)
    del sys.modules["ldm_patched.modules.samplers"].calc_cond_uncond_batch
    with pytest.raises(ImportError, match="calc_cond_uncond_batch"):
        monitor.ask(latents(2, 4))
