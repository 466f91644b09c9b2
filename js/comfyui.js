// The stability graph on ComfyUI's nodes: listens to the server and gives each run to the node it belongs to.
//
// The guard's node gets its runs as events while the sampler works, the report's node gets them in its output. Both keep their last
// runs in the node's properties, so that the graph is there again after a reload, and when ComfyUI takes the result from its cache.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { QUANTITIES, StabilityGraph, addStep, finishRun, runOf, startRun } from "./graph.js";

const EVENT = "memorization_guard"; // also the key in the output of a report
const EMPTY = {
  MemorizationGuard: "The graph is drawn while the sampler runs.",
  MemorizationGuardReport: "The graph is shown after the run.",
};
const SPEAKERS = ["MemorizationGuardSaveProfile", "MemorizationGuardCalibrate", "MemorizationGuardGate"]; // their output is text
const CACHED = "The result came from the cache. Change the seed to sample again.";
const WIDGET = "stability_graph";
const WIDTH = 340;
const HEIGHT = 200; // of the graph, at least
const ROOM = 30; // additional height in a new node
const MOST_RUNS = 8; // a tiled upscaler makes dozens of runs: the last ones are kept
const KEPT_IMAGES = 4; // images of a batch that are saved with the workflow
const KEPT_STEPS = ["sigma", "latent_norm", "update_norm", "denoised_norm", "update_score", "denoised_score", "mitigated"];

// A run is {name, node, run, traces, at}: `name` is prompt:sampler node:place in its list:number, `node` the id of the node that
// shows it, `run` what graph.js draws, `at` when it ended.

/** A node's runs with one more. Runs of the same prompt are kept, those of an earlier prompt are replaced. */
function joined(runs, one) {
  return [...runs.filter((each) => promptOf(each) === promptOf(one) && each.name !== one.name), one].slice(-MOST_RUNS);
}

const promptOf = ({ name }) => String(name).split(":")[0];

// ---------------------------------------------------------------------------------------------------------------- on a node

/** The graph of one node, and a button for each run if there are several. */
class Panel {
  #node;
  #graph = null; // exists while the node is part of a workflow
  #theme = null; // observes changes of the theme
  #place = null; // key in `places`
  #bar;
  #view;
  #runs = [];
  #shown = null;

  constructor(node) {
    this.#node = node;
    this.#bar = styled("div", { display: "flex", flex: "none", flexWrap: "wrap", gap: "4px", padding: "0 0 4px" });
    this.#view = styled("div", { flex: "1 1 0", minHeight: "0" });
    this.element = styled("div", { display: "flex", flexDirection: "column", width: "100%", height: "100%" });
    this.element.append(this.#bar, this.#view);
  }

  attach() {
    if (this.#graph) return;
    this.#takePlace();
    this.#theme = new MutationObserver(() => this.#followTheme());
    this.#theme.observe(document.body, { attributes: true, attributeFilter: ["class"] });
    this.#theme.observe(document.documentElement, { attributes: true, attributeFilter: ["style"] });
    this.#graph = new StabilityGraph(this.#view, {
      compact: true,
      onQuantity: (quantity) => (this.#node.properties.stability_quantity = quantity),
    });
    this.restore();
    this.#followTheme();
  }

  detach() {
    if (this.element.isConnected) places.set(this.#place, this.element);
    this.#theme?.disconnect();
    this.#graph?.destroy();
    this.#graph = null;
  }

  /** Undo creates every node again. Nodes 2.0 then keep the element of the old node on the page, so the new node takes it over. */
  #takePlace() {
    this.#place = `${this.#node.graph?.id} ${this.#node.id}`;
    const element = places.get(this.#place);
    places.delete(this.#place);
    if (!element || element === this.element) return;
    element.replaceChildren(this.#bar, this.#view);
    this.element = element;
    for (const widget of this.#node.widgets) if (widget.name === WIDGET) widget.element = element;
  }

  /** Older frontends set a class when they are dark, and nothing when they are light. Newer ones set a style property. */
  #followTheme() {
    const dark = document.body.classList.contains("dark-theme") || document.documentElement.style.colorScheme === "dark";
    const theme = dark ? "dark" : "light";
    if (this.element.dataset.theme === theme) return;
    this.element.dataset.theme = theme;
    this.#show(this.#shown);
  }

  /** Shows what the node's properties hold. */
  restore() {
    const { stability_runs: kept, stability_quantity: quantity } = this.#node.properties ?? {};
    if (this.#graph && QUANTITIES.includes(quantity)) this.#graph.quantity = quantity;
    const runs = (Array.isArray(kept) ? kept : []).filter((one) => Array.isArray(one?.traces));
    this.#runs = runs.map((one) => ({ ...one, run: runOf(one.traces), kept: true }));
    this.#show(this.#runs.at(-1) ?? null);
  }

  /** Shows a new run, or what is new in a run. */
  take(one) {
    if (!this.#runs.includes(one)) {
      this.#runs = joined(this.#runs, one);
      this.#show(one);
    } else if (one === this.#shown) this.#graph?.show(one.run);
  }

  /** Shows a message if there is no graph. */
  say(message) {
    if (!this.#shown) this.#graph?.clear(message);
  }

  #show(one) {
    this.#shown = one;
    const several = this.#runs.length > 1 ? this.#runs : [];
    const buttons = several.map((each, i) => {
      const button = styled("button", {
        border: "0", padding: "1px 8px", borderRadius: "6px", font: "11px/16px system-ui, sans-serif", cursor: "pointer",
        color: "var(--input-text, #ddd)", background: each === one ? "var(--comfy-input-bg, #222)" : "transparent",
      });
      button.type = "button";
      button.textContent = `run ${i + 1}`;
      button.title = `sampler: node ${String(each.name).split(":").slice(1, -2).join(":")}`;
      button.setAttribute("aria-pressed", String(each === one));
      button.addEventListener("pointerdown", (event) => event.stopPropagation()); // or the node is dragged
      button.addEventListener("click", () => this.#show(each));
      return button;
    });
    this.#bar.replaceChildren(...buttons);
    if (one?.kept && one.at) {
      const when = styled("span", { marginLeft: "auto", font: "11px/18px system-ui, sans-serif", opacity: "0.7" });
      when.textContent = `run of ${new Date(one.at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
      this.#bar.append(when);
    }
    this.#bar.hidden = !this.#bar.childElementCount;
    this.#bar.style.display = this.#bar.hidden ? "none" : "flex";
    if (one) this.#graph?.show(one.run);
    else this.#graph?.clear(EMPTY[this.#node.comfyClass]);
  }
}

function styled(tag, style) {
  const element = document.createElement(tag);
  Object.assign(element.style, style);
  return element;
}

/** Frontends before Nodes 2.0 have a menu entry for advanced widgets, but show them until a node hides them. */
function fold(node) {
  for (const widget of node.widgets) {
    if (!widget.options?.advanced || widget.advanced !== undefined) continue;
    widget.advanced = true;
    // The layout adds 4 pixels to the height of every widget, hidden ones included.
    widget.computeSize = (width) => (node.isWidgetVisible(widget) ? [width, LiteGraph.NODE_WIDGET_HEIGHT] : [width, -4]);
  }
}

/** Adds a field for the text that a node puts out when it ran. The text can be copied. */
function speaker(node) {
  const element = styled("div", {
    padding: "4px 8px", borderRadius: "6px", overflow: "auto", whiteSpace: "pre-wrap", overflowWrap: "anywhere", userSelect: "text",
    font: "12px/16px system-ui, sans-serif", color: "var(--input-text, #ddd)", background: "var(--comfy-input-bg, #222)",
  });
  element.setAttribute("role", "status");
  element.addEventListener("pointerdown", (event) => event.stopPropagation()); // or the node is dragged
  node.addDOMWidget("said", "SAID", element, { serialize: false, getMinHeight: () => 44 });
  speakers.set(node, element);
}

const speakers = new WeakMap(); // node -> element of its text
const panels = new WeakMap(); // node -> Panel
const places = new Map(); // ids of graph and node -> element of a node that was removed

// ------------------------------------------------------------------------------------------------------- whose run it is

const MOST_PROMPTS = 50;
const PROMPTS = "memorization_guard.prompts"; // in the session storage, for a page that is reloaded while a prompt waits

const active = () => app.extensionManager?.workflow?.activeWorkflow ?? null;

const owners = new Map(Object.entries(readPrompts()).map(([prompt, path]) => [prompt, { workflow: null, path }]));
let asking = null; // owner of the prompt that is being queued: its events may come before its id
let loading = null; // state of the workflow that was active when ComfyUI began to load a graph

function readPrompts() {
  try {
    return JSON.parse(sessionStorage.getItem(PROMPTS)) ?? {};
  } catch {
    return {};
  }
}

function own(prompt, owner) {
  owners.set(prompt, owner);
  while (owners.size > MOST_PROMPTS) owners.delete(owners.keys().next().value);
  try {
    sessionStorage.setItem(PROMPTS, JSON.stringify(Object.fromEntries([...owners].map(([id, { path }]) => [id, path]))));
  } catch {
    // The storage is full or forbidden. It is needed only after a reload.
  }
}

/** The workflow that a prompt was queued from. For a prompt queued elsewhere: the workflow shown when its first event came. */
function ownerOf(prompt) {
  if (!owners.has(prompt) && !asking && !active()) return null; // the page is still loading
  if (!owners.has(prompt)) own(prompt, asking ?? { workflow: active(), path: active()?.path });
  const owner = owners.get(prompt);
  owner.workflow ??= app.extensionManager?.workflow?.openWorkflows?.find((each) => each.path === owner.path) ?? null;
  return owner.workflow;
}

/** Whether the nodes on the page are those of `workflow`. While ComfyUI loads a graph, they are not yet those of the active one. */
function isOnShow(workflow) {
  if (loading !== null && loading !== active()?.changeTracker?.activeState) loading = null;
  return loading === null && workflow === active();
}

/** The node on the page with an id like "7", or "12:7" for a node inside a subgraph. */
function nodeOf(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph ?? app.graph;
  for (const part of path.slice(0, -1)) graph = nodeIn(graph, part)?.subgraph;
  return nodeIn(graph, path.at(-1));
}

// Ids are numbers in older frontends, strings in newer ones.
const nodeIn = (graph, id) => graph?.getNodeById?.(id) ?? graph?.getNodeById?.(Number(id)) ?? null;

/** The same node in the saved form of a workflow. */
function recordOf(state, id) {
  const path = String(id).split(":");
  const find = (nodes, part) => nodes?.find((node) => String(node.id) === part);
  let nodes = state?.nodes;
  for (const part of path.slice(0, -1)) {
    const type = find(nodes, part)?.type;
    nodes = state.definitions?.subgraphs?.find((each) => each.id === type)?.nodes;
  }
  return find(nodes, path.at(-1));
}

// ------------------------------------------------------------------------------------------------------------- the events

let runs = new Map(); // name -> run, of the prompt that is running

function listen({ detail: { kind, run: name, node, ...data } }) {
  const prompt = promptOf({ name });
  if ([...runs.values()].some((each) => promptOf(each) !== prompt)) runs = new Map(); // one prompt runs at a time
  if (kind === "begin" || !runs.has(name)) runs.set(name, { name, node, run: startRun(data), traces: null });
  const one = runs.get(name);
  if (kind === "step") addStep(one.run, data);
  if (kind === "end") end(one, data.traces);
  draw(one);
}

/**
 * The output of a node, from a run or from ComfyUI's cache: the runs of a report, or a text. A node's `onExecuted` is not used, since
 * ComfyUI calls it for any node with this id in the workflow on the page.
 */
function executed({ detail: { prompt_id: prompt, node, display_node: shown, output } }) {
  const text = output?.text;
  if (Array.isArray(text) && isOnShow(ownerOf(prompt))) {
    const element = speakers.get(nodeOf(shown ?? node));
    if (element) element.textContent = text.join("\n");
  }
  const entries = output?.[EVENT];
  if (!Array.isArray(entries)) return;
  entries.forEach((entry, i) => {
    const one = { name: `${prompt}:${entry.sampler_node ?? ""}:0:${i}`, node: shown ?? node, run: startRun(null), traces: null };
    end(one, entry.traces);
    draw(one);
  });
}

function cached({ detail: { prompt_id: prompt, nodes } }) {
  if (!isOnShow(ownerOf(prompt))) return;
  for (const id of nodes ?? []) panels.get(nodeOf(id))?.say(CACHED);
}

function draw(one) {
  if (isOnShow(ownerOf(promptOf(one)))) panels.get(nodeOf(one.node))?.take(one);
}

function end(one, traces) {
  Object.assign(one, { traces: Array.isArray(traces) ? traces : [], at: Date.now() });
  finishRun(one.run, one.traces);
  keep(one);
}

/**
 * Puts a run into the properties of its node, in every state that the workflow remembers. So a run does not count as an edit: it
 * does not mark the workflow as changed, and undo does not remove it. A workflow that is not on the page shows it when it is opened.
 */
function keep(one) {
  const kept = JSON.parse(JSON.stringify({ name: one.name, at: one.at, traces: one.traces.slice(0, KEPT_IMAGES).map(short) }));
  const into = (node) => {
    if (!node || !((node.comfyClass ?? node.type) in EMPTY)) return;
    node.properties ??= {};
    const before = Array.isArray(node.properties.stability_runs) ? node.properties.stability_runs : [];
    node.properties.stability_runs = joined(before, kept);
  };
  const owner = ownerOf(promptOf(one));
  const tracker = owner?.changeTracker;
  const { initialState, activeState, undoQueue = [], redoQueue = [] } = tracker ?? {};
  for (const state of new Set([initialState, activeState, ...undoQueue, ...redoQueue])) into(recordOf(state, one.node));
  if (!isOnShow(owner)) return;
  into(nodeOf(one.node));
  // This makes ComfyUI store the workflow for a reload. In the mode "run on change" it would also run it again.
  if (app.extensionManager?.queueSettings?.mode !== "change") tracker?.updateModified?.();
}

/** The part of a trace that the graph shows, with four digits: it is saved with the workflow. */
function short(trace) {
  const digits = (values) => values?.map((value) => (typeof value === "number" ? Number(value.toPrecision(4)) : value));
  const { verdict, score, p_value, p_value_floor, trigger_step, nonfinite_step, note, reference_count } = trace;
  const bands = {};
  for (const [name, band] of Object.entries(trace.bands ?? {})) bands[name] = { mean: digits(band.mean), std: digits(band.std) };
  const steps = {};
  for (const name of KEPT_STEPS) steps[name] = digits(trace.steps?.[name]);
  for (const name of KEPT_STEPS) if (!steps[name]?.some(Boolean)) delete steps[name];
  const thresholds = { gamma: trace.thresholds?.gamma };
  return { verdict, score, p_value, p_value_floor, trigger_step, nonfinite_step, note, reference_count, thresholds, bands, steps };
}

/**
 * Notes which workflow a prompt is queued from: ComfyUI does not tell, and another workflow may be on the page when it runs. Also
 * removes earlier runs from the workflow that goes into the metadata of the images, since they are not the runs of these images.
 */
function noteQueued() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (number, data, ...rest) {
    const owner = { workflow: active(), path: active()?.path };
    for (const nodes of [data?.workflow?.nodes, ...(data?.workflow?.definitions?.subgraphs ?? []).map((each) => each.nodes)]) {
      for (const node of nodes ?? []) if (node.type in EMPTY) delete node.properties?.stability_runs;
    }
    asking = owner;
    try {
      const answer = await queuePrompt.call(this, number, data, ...rest);
      if (answer?.prompt_id) own(answer.prompt_id, owner);
      return answer;
    } finally {
      if (asking === owner) asking = null;
    }
  };
}

app.registerExtension({
  name: "MemorizationGuard.StabilityGraph",

  setup: noteQueued,

  beforeConfigureGraph() {
    places.clear();
    loading = active()?.changeTracker?.activeState ?? null;
  },

  nodeCreated(node) {
    if (SPEAKERS.includes(node.comfyClass)) speaker(node);
    if (!(node.comfyClass in EMPTY)) return;
    const panel = new Panel(node);
    panels.set(node, panel);
    node.addDOMWidget(WIDGET, "STABILITY_GRAPH", panel.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
    });
    fold(node);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, WIDTH), height + ROOM]);

    // Some nodes are never added to a graph, as for a preview or during a copy. They must not start anything.
    const { onAdded, onConfigure, onRemoved } = node;
    node.onAdded = function (...args) {
      onAdded?.apply(this, args);
      panel.attach();
    };
    node.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      panel.restore();
    };
    node.onRemoved = function (...args) {
      panel.detach();
      onRemoved?.apply(this, args);
    };
  },
});

// At import: a run may go on during a reload, and the frontend warns of events that nobody listens to.
api.addEventListener(EVENT, listen);
api.addEventListener("executed", executed);
api.addEventListener("execution_cached", cached);
