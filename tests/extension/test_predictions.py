"""The seam of the WebUI and of Forge without a host: what is judged, what is replaced, and that nothing is left behind."""

import copy
import math
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
    shared.opts = types.SimpleNamespace(skip_early_cond=0.0)
    package = types.ModuleType("modules")
    package.script_callbacks, package.shared = callbacks, shared
    for module in (package, callbacks, shared):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


@pytest.fixture
def predictions(load_extension, modules):
    return load_extension("predictions")


class Monitor:
    """Says what it was given, and gives what it is told to: ``None`` for the conditional prediction itself."""

    def __init__(self, corrected=None):
        self.corrected, self.seen, self.errors = corrected, [], []

    def predicted(self, x, sigma, cond, uncond):
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
        params = types.SimpleNamespace(x=x_in, sigma=sigma_in, denoiser=self)
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

    def broken(*_):
        raise ZeroDivisionError

    with predictions.judged(denoiser, monitor, broken):
        assert torch.isfinite(denoiser(X, SIGMA)).all()
    assert [type(error) for error in monitor.errors] == [ZeroDivisionError]


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
            callback(types.SimpleNamespace(x=x, sigma=sigma, denoiser=self))
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
