"""Another extension of the WebUI, which mixes the two predictions in its own way and asks nobody else."""

import gradio
import modules.scripts
from modules import script_callbacks


class OtherGuidance(modules.scripts.Script):
    def title(self):
        return "Other guidance"

    def show(self, is_img2img):
        return modules.scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gradio.Checkbox(False, label="Other guidance")]

    def process_batch(self, p, enabled=False, **kwargs):
        if enabled:
            script_callbacks.on_cfg_denoiser(mix)

    def postprocess_batch(self, p, enabled=False, **kwargs):
        script_callbacks.remove_callbacks_for_function(mix)


def mix(params):
    """Guidance, rescaled (Lin et al. 2023)."""
    inherited = type(params.denoiser).combine_denoised

    def combine_denoised(x_out, conds_list, uncond, cond_scale):
        guided = inherited(params.denoiser, x_out, conds_list, uncond, cond_scale)
        prompted = x_out[[conds[0][0] for conds in conds_list]]
        return guided * (prompted.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True))

    params.denoiser.combine_denoised = combine_denoised
