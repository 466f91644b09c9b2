// The stability graph on ComfyUI's nodes: listens to the server, and hands each run to the node that it belongs to.
//
// A guard's node gets its runs as events while the sampler works, a report's node gets them in its output. Both keep what they
// last showed in the node's properties, so that it is there again after a reload, and where ComfyUI had nothing to run again.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { QUANTITIES, StabilityGraph, addStep, finishRun, runOf, startRun } from "./graph.js";

const EVENT = "memorization_guard"; // also the key of a report's output
const EMPTY = {
  MemorizationGuard: "The graph draws itself while the sampler runs.",
  MemorizationGuardReport: "The graph stands here after the run.",
};
const SPEAKERS = ["MemorizationGuardSaveProfile", "MemorizationGuardCalibrate", "MemorizationGuardGate"]; // their output is text
const CACHED = "The result came from the cache. Change the seed to sample again.";
const WIDGET = "stability_graph";
const WIDTH = 340;
const HEIGHT = 200; // of the graph, at least
const ROOM = 30; // that a new node gives it beyond
const MOST_RUNS = 8; // a tiled upscaler makes dozens: the last ones are kept
const KEPT_IMAGES = 4; // of a batch, in a saved workflow
const KEPT_STEPS = [
  "sigma", "latent_norm", "update_norm", "denoised_norm", "update_score", "denoised_score", "corrected_latent_norm",
  "corrected_update_norm", "mitigated",
];

// A run is {name, prompt, node, run, traces, at}: `name` is prompt:sampler node:place in its list:number, `node` the id of the node
// that shows it, `run` what graph.js draws, `at` when it ended.

/** A node's runs with one more: another sampler of the same prompt stands beside it, what an earlier prompt left is replaced. */
function joined(runs, one) {
  return [...runs.filter((each) => promptOf(each) === promptOf(one) && each.name !== one.name), one].slice(-MOST_RUNS);
}

const promptOf = ({ name }) => String(name).split(":")[0];

// ---------------------------------------------------------------------------------------------------------------- on a node

/** The graph of one node, and a button for each run where there are several. */
class Panel {
  #node;
  #graph = null; // while the node is part of a workflow
  #theme = null; // its observer
  #place = null;
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

  /**
   * Undo makes every node anew. Nodes 2.0 take the new one for the old, and leave in place the element that they have: so the
   * new node goes on with it.
   */
  #takePlace() {
    this.#place = `${this.#node.graph?.id} ${this.#node.id}`;
    const element = places.get(this.#place);
    places.delete(this.#place);
    if (!element || element === this.element) return;
    element.replaceChildren(this.#bar, this.#view);
    this.element = element;
    for (const widget of this.#node.widgets) if (widget.name === WIDGET) widget.element = element;
  }

  /** Older frontends say when they are dark, and nothing when they are light; newer ones say it by a property of style. */
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

  /** Takes in a run, or what is new in it. */
  take(one) {
    if (!this.#runs.includes(one)) {
      this.#runs = joined(this.#runs, one);
      this.#show(one);
    } else if (one === this.#shown) this.#graph?.show(one.run);
  }

  /** Says why there is no graph, where there is none. */
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

/** Frontends before Nodes 2.0 know of advanced widgets, with an entry in the node's menu, but do not fold them by themselves. */
function fold(node) {
  for (const widget of node.widgets) {
    if (!widget.options?.advanced || widget.advanced !== undefined) continue;
    widget.advanced = true;
    // Their layout adds 4 to a height, also to that of a widget that is not drawn.
    widget.computeSize = (width) => (node.isWidgetVisible(widget) ? [width, LiteGraph.NODE_WIDGET_HEIGHT] : [width, -4]);
  }
}

/** A place for what a node says after it ran; readable, and to be copied from. */
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

const speakers = new WeakMap(); // node -> where its text stands
const panels = new WeakMap(); // node -> Panel
const places = new Map(); // graph and node -> element of a node that was taken away

// ------------------------------------------------------------------------------------------------------- whose run it is

const MOST_PROMPTS = 50;
const PROMPTS = "memorization_guard.prompts"; // in the session's storage: a page that is reloaded while it waits still knows them

const active = () => app.extensionManager?.workflow?.activeWorkflow ?? null;

const owners = new Map(Object.entries(readPrompts()).map(([prompt, path]) => [prompt, { workflow: null, path }]));
let asking = null; // owner of a prompt that is being queued: its events may come before its id
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
    // Storage is full or forbidden: only a reload would have needed it.
  }
}

/** The workflow that a prompt was queued from; of one that was queued by other means, the one on show when it was first heard of. */
function ownerOf(prompt) {
  if (!owners.has(prompt) && !asking && !active()) return null; // the page is still loading
  if (!owners.has(prompt)) own(prompt, asking ?? { workflow: active(), path: active()?.path });
  const owner = owners.get(prompt);
  owner.workflow ??= app.extensionManager?.workflow?.openWorkflows?.find((each) => each.path === owner.path) ?? null;
  return owner.workflow;
}

/** Whether the nodes on show are those of `workflow`. While ComfyUI loads a graph they are not yet those of the active one. */
function isOnShow(workflow) {
  if (loading !== null && loading !== active()?.changeTracker?.activeState) loading = null;
  return loading === null && workflow === active();
}

/** The node on show that has an id like "7", or "12:7" for one inside a subgraph. */
function nodeOf(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph ?? app.graph;
  for (const part of path.slice(0, -1)) graph = nodeIn(graph, part)?.subgraph;
  return nodeIn(graph, path.at(-1));
}

// Ids are numbers in older frontends, strings in newer ones.
const nodeIn = (graph, id) => graph?.getNodeById?.(id) ?? graph?.getNodeById?.(Number(id)) ?? null;

/** The same in a workflow as it is saved. */
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

let runs = new Map(); // name -> run, of the prompt under way

function listen({ detail: { kind, run: name, node, ...data } }) {
  const prompt = promptOf({ name });
  if ([...runs.values()].some((each) => promptOf(each) !== prompt)) runs = new Map(); // one prompt runs at a time
  if (kind === "begin" || !runs.has(name)) runs.set(name, { name, node, run: startRun(data), traces: null });
  const one = runs.get(name);
  if (kind === "step") addStep(one.run, data);
  if (kind === "end") end(one, data.traces);
  draw(one);
}

/** A node's output: a report's runs, or what a node says, from a run or from ComfyUI's cache. `onExecuted` would come to any node that has this id in the workflow on show. */
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
 * Puts a run into the properties of its node, and into those of every state that the workflow remembers: a run is no edit, which
 * would mark the workflow as changed and be taken back by undo. A workflow that is not on show finds it when it is opened again.
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
  // ComfyUI now keeps the workflow for a reload. In "run on change" it would also run it again.
  if (app.extensionManager?.queueSettings?.mode !== "change") tracker?.updateModified?.();
}

/** As much of a trace as the graph shows, with four digits: it is saved with the workflow. */
function short(trace) {
  const digits = (values) => values?.map((value) => (typeof value === "number" ? Number(value.toPrecision(4)) : value));
  const { verdict, score, tail_probability, trigger_step, nonfinite_step, note, mitigation, reference_count } = trace;
  const bands = {};
  for (const [name, band] of Object.entries(trace.bands ?? {})) bands[name] = { mean: digits(band.mean), std: digits(band.std) };
  const steps = {};
  for (const name of KEPT_STEPS) steps[name] = digits(trace.steps?.[name]);
  for (const name of KEPT_STEPS) if (!steps[name]?.some(Boolean)) delete steps[name];
  const thresholds = { gamma: trace.thresholds?.gamma };
  return {
    verdict, score, tail_probability, trigger_step, nonfinite_step, note, mitigation, reference_count, thresholds, bands, steps,
  };
}

/**
 * Nothing in ComfyUI tells which workflow a prompt came from, and another one may be on show when it runs: so it is noted here.
 * The workflow that goes along, into the images' metadata, leaves out the runs on show, which are not those of these images.
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

    // A node that is never added, as for a preview or in the middle of a copy, starts nothing that would have to be ended.
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

// At once, since after a reload a run may be under way: the frontend complains of events that nobody listens to.
api.addEventListener(EVENT, listen);
api.addEventListener("executed", executed);
api.addEventListener("execution_cached", cached);
