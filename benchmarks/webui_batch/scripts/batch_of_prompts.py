"""For benchmarks/webui_samplers.py, among the extensions of its server: samples several prompts, one a line, in one batch."""

import gradio
import modules.scripts
from modules import processing


class BatchOfPrompts(modules.scripts.Script):
    def title(self):
        return "Batch of prompts"

    def ui(self, is_img2img):
        return [gradio.Textbox(lines=3, label="Prompts")]

    def run(self, p, prompts):
        p.prompt = prompts.splitlines()
        p.batch_size, p.do_not_save_grid = len(p.prompt), True
        return processing.process_images(p)
