// Functions for the page. Nodes are found by their path of ids, as the server names them.
(() => {
  const inGraph = (graph, id) => graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
  const mg = (window.mg = {});
  mg.node = (id) => {
    let graph = app.rootGraph ?? app.graph;
    const path = String(id).split(":");
    for (const part of path.slice(0, -1)) graph = inGraph(graph, part)?.subgraph;
    return inGraph(graph, path.at(-1));
  };
  mg.box = (id) => mg.node(id)?.widgets.find((widget) => widget.name === "stability_graph").element;
  // A curve each image, of the update norm: see `mg.add`.
  mg.curves = (id) => [...(mg.box(id)?.querySelectorAll(".mg-scene .mg-run[points]") ?? [])].map((curve) => {
    const words = curve.getAttribute("points").split(" ");
    return words.length;
  });
  mg.points = (id) => mg.curves(id)[0] ?? 0;
  mg.label = (id) => mg.box(id).querySelector("svg.mg-svg").getAttribute("aria-label");
  mg.kept = (id) => mg.node(id).properties.stability_runs ?? [];
  mg.tracker = () => app.extensionManager.workflow.activeWorkflow.changeTracker;
  mg.add = (type, at, values = {}) => {
    const node = LiteGraph.createNode(type);
    if (!node) throw new Error(`there is no ${type}`);
    node.properties.stability_quantity = "update"; // its curves have a point each step
    app.graph.add(node);
    node.pos = at;
    for (const [name, value] of Object.entries(values)) mg.set(node, name, value);
    return node;
  };
  mg.set = (node, name, value) => {
    const widget = node.widgets.find((each) => each.name === name);
    if (!widget) throw new Error(`${node.type} has no ${name}`);
    widget.value = value;
  };
  mg.link = (from, output, to, input) => {
    const index = to.inputs.findIndex((each) => each.name === input);
    if (index < 0) throw new Error(`${to.type} has no ${input}`);
    from.connect(output, to, index);
  };
  // A loader, and for each of `guards` its own guard, sampler(s), report and image.
  mg.build = (guards) => {
    app.graph.clear();
    const lab = mg.add("MemorizationGuardLoadLabModel", [40, 60]);
    const nothing = mg.add("CLIPTextEncode", [40, 460], {text: ""});
    mg.link(lab, 1, nothing, "clip");
    return guards.map(({prompt, steps, batch, seed, mode, samplers = 1}, row) => {
      const top = 60 + 900 * row;
      const text = mg.add("CLIPTextEncode", [40, top + 200], {text: prompt});
      mg.link(lab, 1, text, "clip");
      const latent = mg.add("EmptyLatentImage", [40, top + 560], {width: 128, height: 128, batch_size: batch});
      const guard = mg.add("MemorizationGuard", [480, top], {mode});
      mg.link(lab, 0, guard, "model");
      mg.link(lab, 3, guard, "profile");
      let image = latent;
      const used = [];
      for (let i = 0; i < samplers; i++) {
        const sampler = mg.add("KSampler", [880 + 320 * i, top], {
          seed, steps: steps + 10 * i, cfg: 7.5, sampler_name: "euler", scheduler: "normal", control_after_generate: "fixed",
        });
        mg.link(guard, 0, sampler, "model");
        mg.link(text, 0, sampler, "positive");
        mg.link(nothing, 0, sampler, "negative");
        mg.link(image, 0, sampler, "latent_image");
        used.push(String(sampler.id));
        image = sampler;
      }
      const report = mg.add("MemorizationGuardReport", [880, top + 330]);
      mg.link(guard, 1, report, "trace");
      mg.link(image, 0, report, "latent");
      const decode = mg.add("VAEDecode", [1560, top]);
      mg.link(report, 0, decode, "samples");
      mg.link(lab, 2, decode, "vae");
      const preview = mg.add("PreviewImage", [1560, top + 80]);
      mg.link(decode, 0, preview, "images");
      return {guard: String(guard.id), report: String(report.id), samplers: used};
    });
  };
  // A loader, and a node that explains a prompt.
  mg.explainer = (text, inputs) => {
    app.graph.clear();
    const lab = mg.add("MemorizationGuardLoadLabModel", [40, 60]);
    const node = mg.add("MemorizationGuardExplainPrompt", [420, 60], {text, ...inputs});
    node.setSize([460, 520]);
    mg.link(lab, 0, node, "model");
    mg.link(lab, 1, node, "clip");
    mg.link(lab, 3, node, "profile");
    return String(node.id);
  };
  mg.told = (id) => mg.node(id)?.widgets.find((widget) => widget.name === "stability_explanation").element;
  // How often the graph is drawn anew, and when.
  mg.watchDraws = (id) => {
    const times = [];
    const scene = mg.box(id).querySelector(".mg-scene");
    new MutationObserver(() => times.push(performance.now())).observe(scene, {childList: true});
    return (mg.draws = times);
  };
  mg.ended = false;
  const api = window.comfyAPI.api.api;
  mg.api = api;
  for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(kind, () => (mg.ended = true));
  }
  mg.queue = async () => {
    mg.ended = false;
    await app.queuePrompt(0, 1);
  };
})()
