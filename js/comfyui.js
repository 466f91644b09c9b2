// The stability graph, and what is told of a prompt, on ComfyUI's nodes: listens to the server and gives each to the node it belongs to.
//
// The guard's node gets its runs as events while the sampler works, the report's node gets them in its output. Both keep their last
// runs in the node's properties, so that the graph is there again after a reload, and when ComfyUI takes the result from its cache.
// The node that explains a prompt does so with what it told.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addStep, finishRun, startRun } from "./graph.js";
import { EXPLANATION, Explanation } from "./explain.js";
import { badge, holds, put, stateOf } from "./outside.js";
import { EMPTY, Panel, WIDGET, forgetPlaces, joined, promptOf, textBox } from "./panel.js";
import { forget, isOnShow, nodeOf, noteLoading, noteQueued, ownerOf, recordOf } from "./workflows.js";

const EVENT = "memorization_guard"; // also the key in the output of a report
const EXPLAINED = "memorization_guard_prompt"; // key in the output of the node that explains a prompt
const EXPLAINER = "MemorizationGuardExplainPrompt";
const SPEAKERS = ["MemorizationGuardSaveProfile", "MemorizationGuardCalibrate", "MemorizationGuardGate"]; // their output is text
const CACHED = "The result came from the cache. Change the seed to sample again.";
const ASLEEP = "This guard is bypassed or muted: nothing is watched.";
const BYPASSED = 4; // LiteGraph has no name for it
const WIDTH = 340;
const HEIGHT = 200; // of the graph, or what is told, at least
const ROOM = 30; // additional height in a new node
const KEPT_IMAGES = 4; // images of a batch that are saved with the workflow
const KEPT_STEPS = ["sigma", "latent_norm", "update_norm", "denoised_norm", "update_score", "denoised_score", "mitigated"];

// ---------------------------------------------------------------------------------------------------------------- on a node

/** Frontends before Nodes 2.0 have a menu entry for advanced widgets, but show them until a node hides them. */
function fold(node) {
  for (const widget of node.widgets) {
    if (!widget.options?.advanced || widget.advanced !== undefined) continue;
    widget.advanced = true;
    // The layout adds 4 pixels to the height of every widget, hidden ones included.
    widget.computeSize = (width) => (node.isWidgetVisible(widget) ? [width, LiteGraph.NODE_WIDGET_HEIGHT] : [width, -4]);
  }
}

/** Workflows that were saved before a choice was there hold the graph's value, which is empty, in its place. */
function mend(node) {
  for (const widget of node.widgets) {
    if (widget.type === "combo" && widget.value === "" && widget.options?.values?.length) widget.value = widget.options.values[0];
  }
}

/** Adds a field for the text that a node puts out when it ran. */
function speaker(node) {
  const element = textBox();
  node.addDOMWidget("said", "SAID", element, { serialize: false, getMinHeight: () => 44 });
  speakers.set(node, element);
}

const speakers = new WeakMap(); // node -> element of its text
const panels = new WeakMap(); // node -> Panel
const explanations = new WeakMap(); // node -> Explanation

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
 * The output of a node, from a run or from ComfyUI's cache: the runs of a report, what is told of a prompt, or a text. A node's
 * `onExecuted` is not used, since ComfyUI calls it for any node with this id in the workflow on the page.
 */
function executed({ detail: { prompt_id: prompt, node, display_node: shown, output } }) {
  const text = output?.text;
  if (Array.isArray(text) && isOnShow(ownerOf(prompt))) {
    const element = speakers.get(nodeOf(shown ?? node));
    if (element) element.textContent = text.join("\n");
  }
  if (Array.isArray(output?.[EXPLAINED])) explain(prompt, shown ?? node, output[EXPLAINED]);
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

/** A node that fails puts nothing out: what it told before is of another prompt. One that is cancelled shows that again. */
function failed({ type: kind, detail: { prompt_id: prompt, node_id: id, node_type: type, exception_message: message } }) {
  if (type !== EXPLAINER || !isOnShow(ownerOf(prompt))) return;
  const explanation = explanations.get(nodeOf(id));
  if (kind === "execution_error") explanation?.say(message);
  else explanation?.restore();
}

/** A guard that a prompt leaves out sends nothing, and would go on showing its last run as if it watched. */
function started({ detail: { prompt_id: prompt } }) {
  if (!isOnShow(ownerOf(prompt))) return;
  for (const node of asleep(app.rootGraph ?? app.graph)) {
    const one = { name: `${prompt}::0:0`, node, run: startRun({ note: ASLEEP }), traces: null };
    end(one, []);
    draw(one);
  }
}

/** Ids of the guards that are bypassed or muted, by themselves or with a subgraph around them. */
function asleep(graph, path = "", outer = false) {
  return (graph?.nodes ?? []).flatMap((node) => {
    const off = outer || node.mode === LiteGraph.NEVER || node.mode === BYPASSED;
    if (node.subgraph) return asleep(node.subgraph, `${path}${node.id}:`, off);
    return off && node.comfyClass === "MemorizationGuard" ? [`${path}${node.id}`] : [];
  });
}

function draw(one) {
  if (!isOnShow(ownerOf(promptOf(one)))) return;
  const node = nodeOf(one.node);
  panels.get(node)?.take(one);
  explanations.get(node)?.say(one.run.note); // how far a profile is that is made first
}

function explain(prompt, id, told) {
  remember(ownerOf(prompt), (find) => {
    const node = find(id);
    if (node) (node.properties ??= {})[EXPLANATION] = told;
  });
  if (isOnShow(ownerOf(prompt))) explanations.get(nodeOf(id))?.restore();
}

function end(one, traces) {
  Object.assign(one, { traces: Array.isArray(traces) ? traces : [], at: Date.now() });
  finishRun(one.run, one.traces);
  keep(one);
}

/** Puts a run into the properties of its node, and its verdict into those of the nodes around. */
function keep(one) {
  const { name, at, run, traces } = one;
  const kept = JSON.parse(JSON.stringify({ name, at, note: run.note, traces: traces.slice(0, KEPT_IMAGES).map(short) }));
  const state = stateOf(one);
  remember(ownerOf(promptOf(one)), (find) => {
    const node = find(one.node);
    const kind = node?.comfyClass ?? node?.type;
    if (kind in EMPTY) {
      node.properties ??= {};
      const before = Array.isArray(node.properties.stability_runs) ? node.properties.stability_runs : [];
      node.properties.stability_runs = joined(before, kept, kind);
    }
    const path = String(one.node).split(":");
    for (let i = 1; i < path.length; i++) put(find(path.slice(0, i).join(":")), state);
  });
}

/**
 * Has `into` put something into a node's properties, in every state that the workflow `owner` remembers; it is given what finds a node by
 * its id. So a run does not count as an edit: it does not mark the workflow as changed, and undo does not remove it. A workflow that is
 * not on the page shows it when it is opened.
 */
function remember(owner, into) {
  const tracker = owner?.changeTracker;
  const { initialState, activeState, undoQueue = [], redoQueue = [] } = tracker ?? {};
  for (const each of new Set([initialState, activeState, ...undoQueue, ...redoQueue])) into((id) => recordOf(each, id));
  if (!isOnShow(owner)) return;
  into(nodeOf);
  app.canvas?.setDirty(true, true);
  // This makes ComfyUI store the workflow for a reload. In the mode "run on change" it would also run it again.
  if (app.extensionManager?.queueSettings?.mode !== "change") tracker?.updateModified?.();
}

/** The part of a trace that the graph shows, with four digits: it is saved with the workflow. Images of a run share their bands. */
function short(trace, image) {
  const digits = (values) => values?.map((value) => (typeof value === "number" ? Number(value.toPrecision(4)) : value));
  const { verdict, score, p_value, p_value_floor, judged_by, words, trigger_step, nonfinite_step, note, reference_count } = trace;
  const bands = {};
  for (const [name, band] of Object.entries((image === 0 && trace.bands) || {})) {
    bands[name] = { mean: digits(band.mean), std: digits(band.std) };
  }
  const steps = {};
  for (const name of KEPT_STEPS) steps[name] = digits(trace.steps?.[name]);
  for (const name of KEPT_STEPS) if (!steps[name]?.some(Boolean)) delete steps[name];
  const { method, false_positive_rate, tau_mild, tau_strong, gamma } = trace.thresholds ?? {};
  const thresholds = { method, false_positive_rate, tau_mild, tau_strong, gamma };
  return {
    verdict, score, p_value, p_value_floor, judged_by, words, trigger_step, nonfinite_step, note, reference_count, thresholds, bands, steps,
  };
}

/** Copies begin without the runs of the node that they were copied from. ComfyUI gives them an id only when it adds them. */
function forgetInCopies(node) {
  const { onConfigure } = node;
  node.onConfigure = function (record, ...args) {
    const id = Number(record.id ?? -1);
    if (id === -1) forget(this);
    // A pasted subgraph is a new one with copies of its nodes. A clone that is not pasted yet shares those of the first.
    if (id === -1 && record.id != null) forgetInside(this);
    onConfigure?.call(this, record, ...args);
  };
}

function forgetInside(node) {
  for (const inner of node.subgraph?.nodes ?? []) {
    forget(inner);
    (panels.get(inner) ?? explanations.get(inner))?.restore();
    forgetInside(inner);
  }
}

app.registerExtension({
  name: "MemorizationGuard.StabilityGraph",

  setup: noteQueued,

  beforeConfigureGraph() {
    forgetPlaces();
    noteLoading();
  },

  nodeCreated(node) {
    if (SPEAKERS.includes(node.comfyClass)) speaker(node);
    if (holds(node)) {
      badge(node);
      forgetInCopies(node);
    }
    const explains = node.comfyClass === EXPLAINER;
    if (!explains && !(node.comfyClass in EMPTY)) return;
    const panel = explains ? new Explanation(node) : new Panel(node);
    (explains ? explanations : panels).set(node, panel);
    node.addDOMWidget(explains ? EXPLANATION : WIDGET, explains ? "STABILITY_EXPLANATION" : "STABILITY_GRAPH", panel.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
    });
    fold(node);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, WIDTH), height + ROOM]);

    // Some nodes are never added to a graph, as for a preview or during a copy. They must not start anything.
    forgetInCopies(node);
    const { onAdded, onConfigure, onRemoved } = node;
    node.onAdded = function (...args) {
      onAdded?.apply(this, args);
      panel.attach();
    };
    node.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      if (node.comfyClass === "MemorizationGuard") mend(node);
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
api.addEventListener("execution_error", failed);
api.addEventListener("execution_interrupted", failed);
api.addEventListener("execution_start", started);
