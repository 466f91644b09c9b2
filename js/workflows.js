// Which workflow a run belongs to, and where its nodes are: on the page, and in the states that a workflow remembers.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

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
export function ownerOf(prompt) {
  if (!owners.has(prompt) && !asking && !active()) return null; // the page is still loading
  if (!owners.has(prompt)) own(prompt, asking ?? { workflow: active(), path: active()?.path });
  const owner = owners.get(prompt);
  owner.workflow ??= app.extensionManager?.workflow?.openWorkflows?.find((each) => each.path === owner.path) ?? null;
  return owner.workflow;
}

/** Whether the nodes on the page are those of `workflow`. While ComfyUI loads a graph, they are not yet those of the active one. */
export function isOnShow(workflow) {
  if (loading !== null && loading !== active()?.changeTracker?.activeState) loading = null;
  return loading === null && workflow === active();
}

/** The node on the page with an id like "7", or "12:7" for a node inside a subgraph. */
export function nodeOf(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph ?? app.graph;
  for (const part of path.slice(0, -1)) graph = nodeIn(graph, part)?.subgraph;
  return nodeIn(graph, path.at(-1));
}

// Ids are numbers in older frontends, strings in newer ones.
const nodeIn = (graph, id) => graph?.getNodeById?.(id) ?? graph?.getNodeById?.(Number(id)) ?? null;

/** The same node in the saved form of a workflow. */
export function recordOf(state, id) {
  const path = String(id).split(":");
  const find = (nodes, part) => nodes?.find((node) => String(node.id) === part);
  let nodes = state?.nodes;
  for (const part of path.slice(0, -1)) {
    const type = find(nodes, part)?.type;
    nodes = state.definitions?.subgraphs?.find((each) => each.id === type)?.nodes;
  }
  return find(nodes, path.at(-1));
}

/** To be called when ComfyUI begins to load a graph: its nodes come after the workflow that they belong to. */
export function noteLoading() {
  loading = active()?.changeTracker?.activeState ?? null;
}

/**
 * Notes which workflow a prompt is queued from: ComfyUI does not tell, and another workflow may be on the page when it runs. Also
 * removes earlier runs from the workflow that goes into the metadata of the images, since they are not the runs of these images.
 */
export function noteQueued() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (number, data, ...rest) {
    const owner = { workflow: active(), path: active()?.path };
    for (const nodes of [data?.workflow?.nodes, ...(data?.workflow?.definitions?.subgraphs ?? []).map((each) => each.nodes)]) {
      for (const node of nodes ?? []) forget(node);
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

/** Removes what a node, or its saved form, remembers of runs. */
export function forget(node) {
  delete node.properties?.stability_runs;
  delete node.properties?.stability_state;
  delete node.properties?.stability_explanation;
}
