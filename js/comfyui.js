// The stability graph on ComfyUI's nodes: listens to the server, and hands each run to the node that it belongs to.
//
// A guard's node gets its runs as events while the sampler works, a report's node from its own output. Both keep what they last
// showed in the node's properties, so that it is there again after a reload or where ComfyUI took the result from its cache.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { StabilityGraph, addStep, finishRun, runOf, startRun } from "./graph.js";

const EVENT = "memorization_guard";
const GUARD = "MemorizationGuard";
const REPORT = "MemorizationGuardReport";
const MIN_HEIGHT = 190;
const MIN_WIDTH = 320;
const MOST_RUNS = 8; // a tiled upscaler makes dozens: the last ones are kept
const KEPT_IMAGES = 4; // of a batch, in a saved workflow
const KEPT_STEPS = [
  "sigma", "latent_norm", "update_norm", "denoised_norm", "update_score", "denoised_score", "corrected_latent_norm",
  "corrected_update_norm", "mitigated",
];

/** The graph of one node, and a button for each run where there are several. */
class Panel {
  #node;
  #graph;
  #tabs;
  #runs = []; // {name, label, prompt, run, traces}
  #shown = null;

  constructor(node) {
    this.#node = node;
    this.element = document.createElement("div");
    Object.assign(this.element.style, { display: "flex", flexDirection: "column", width: "100%", height: "100%" });
    this.#tabs = document.createElement("div");
    this.#tabs.setAttribute("role", "group");
    this.#tabs.setAttribute("aria-label", "Runs");
    Object.assign(this.#tabs.style, { display: "flex", gap: "4px", flexWrap: "wrap", padding: "2px" });
    const view = document.createElement("div");
    Object.assign(view.style, { flex: "1 1 0", minHeight: "0" });
    this.element.append(this.#tabs, view);
    this.#graph = new StabilityGraph(view, {
      compact: true,
      quantity: node.properties?.stability_quantity ?? "update",
      onQuantity: (quantity) => (node.properties.stability_quantity = quantity),
    });
    this.#graph.clear("The graph draws itself while the sampler runs.");
  }

  begin(name, prompt, outline) {
    // What an earlier prompt left is replaced; a second sampler of the same prompt stands beside the first.
    this.#runs = this.#runs.filter((one) => one.prompt === prompt && one.name !== name).slice(1 - MOST_RUNS);
    this.#runs.push({ name, prompt, run: startRun(outline), traces: null });
    this.#show(this.#runs.at(-1));
  }

  step(name, event) {
    const found = this.#runs.find((one) => one.name === name);
    if (!found) return;
    addStep(found.run, event);
    if (found === this.#shown) this.#graph.show(found.run);
  }

  end(name, traces) {
    const found = this.#runs.find((one) => one.name === name);
    if (!found) return;
    found.traces = traces;
    finishRun(found.run, traces);
    if (found === this.#shown) this.#graph.show(found.run);
    this.#keep();
  }

  /** Shows finished runs: lists of traces, one list a run. */
  set(runs) {
    this.#runs = runs.slice(-MOST_RUNS).map((traces, i) => ({ name: String(i), prompt: null, run: runOf(traces), traces }));
    this.#show(this.#runs.at(-1) ?? null);
    this.#keep();
  }

  /** Shows what the node's properties hold. */
  restore() {
    const kept = this.#node.properties?.stability_runs;
    const quantity = this.#node.properties?.stability_quantity;
    if (quantity) {
      try {
        this.#graph.quantity = quantity;
      } catch {
        delete this.#node.properties.stability_quantity; // edited by hand
      }
    }
    if (!Array.isArray(kept) || !kept.length) return;
    this.#runs = kept.map((traces, i) => ({ name: String(i), prompt: null, run: runOf(traces), traces }));
    this.#show(this.#runs.at(-1));
  }

  destroy() {
    this.#graph.destroy();
  }

  #keep() {
    this.#node.properties.stability_runs = this.#runs.filter((one) => one.traces).map((one) => one.traces.slice(0, KEPT_IMAGES).map(short));
    // Otherwise undo would take the picture for an edit of the user's.
    app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
  }

  #show(one) {
    this.#shown = one;
    this.#tabs.replaceChildren(
      ...(this.#runs.length < 2 ? [] : this.#runs).map((each, i) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = `run ${i + 1}`;
        button.setAttribute("aria-pressed", String(each === one));
        Object.assign(button.style, { font: "11px system-ui, sans-serif", opacity: each === one ? "1" : "0.6" });
        button.addEventListener("pointerdown", (event) => event.stopPropagation());
        button.addEventListener("click", () => this.#show(each));
        return button;
      }),
    );
    if (one) this.#graph.show(one.run);
  }
}

/** As much of a trace as the graph shows, with four digits: it is saved with the workflow. */
function short(trace) {
  const digits = (values) => values?.map((value) => (typeof value === "number" ? Number(value.toPrecision(4)) : value));
  const { verdict, score, trigger_step, nonfinite_step, note, mitigation, reference_count } = trace;
  const bands = {};
  for (const [name, band] of Object.entries(trace.bands ?? {})) bands[name] = { mean: digits(band.mean), std: digits(band.std) };
  const steps = {};
  for (const name of KEPT_STEPS) steps[name] = digits(trace.steps?.[name]);
  if (!steps.mitigated?.includes(true)) delete steps.corrected_latent_norm, delete steps.corrected_update_norm;
  const thresholds = { gamma: trace.thresholds?.gamma };
  return { verdict, score, trigger_step, nonfinite_step, note, mitigation, reference_count, thresholds, bands, steps };
}

const panels = new WeakMap(); // node -> Panel
const places = new Map(); // run under way -> {node, id, workflow}

const workflow = () => app.extensionManager?.workflow?.activeWorkflow?.path ?? null;

/** The node of an id like "7", or "12:7" for one inside a subgraph. */
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  const path = String(id).split(":");
  for (const part of path.slice(0, -1)) graph = nodeIn(graph, part)?.subgraph;
  return nodeIn(graph, path.at(-1));
}

function nodeIn(graph, id) {
  return graph?.getNodeById?.(id) ?? graph?.getNodeById?.(Number(id)) ?? null;
}

/** The panel of a run: that of its node as long as it is there, and of its successor when the workflow was closed and opened. */
function panelOf({ run, node: id, kind }) {
  let place = places.get(run);
  if (!place) {
    if (kind !== "begin") return null;
    place = { node: findNode(id), id, workflow: workflow() };
    places.set(run, place);
  } else if (!place.node?.graph && place.workflow === workflow()) {
    place.node = findNode(id);
  }
  if (kind === "end") places.delete(run);
  return (place.node?.graph && panels.get(place.node)) || null;
}

function listen({ detail }) {
  const panel = panelOf(detail);
  if (!panel) return;
  if (detail.kind === "begin") panel.begin(detail.run, detail.run.split(":")[0], detail);
  else if (detail.kind === "step") panel.step(detail.run, detail);
  else if (detail.kind === "end") panel.end(detail.run, detail.traces);
}

app.registerExtension({
  name: "MemorizationGuard.StabilityGraph",

  setup() {
    api.addEventListener(EVENT, listen);
  },

  nodeCreated(node) {
    if (node.comfyClass !== GUARD && node.comfyClass !== REPORT) return;
    const panel = new Panel(node);
    panels.set(node, panel);
    node.addDOMWidget("stability_graph", "STABILITY_GRAPH", panel.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => MIN_HEIGHT,
    });
    node.setSize?.([Math.max(node.size[0], MIN_WIDTH), Math.max(node.size[1], node.computeSize?.()[1] ?? 0)]);

    const { onConfigure, onRemoved, onExecuted } = node;
    node.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      panel.restore();
    };
    node.onRemoved = function (...args) {
      panel.destroy();
      onRemoved?.apply(this, args);
    };
    if (node.comfyClass === REPORT) {
      node.onExecuted = function (output, ...args) {
        onExecuted?.call(this, output, ...args);
        if (output?.[EVENT]) panel.set(output[EVENT].map((entry) => entry.traces));
      };
    }
  },
});
