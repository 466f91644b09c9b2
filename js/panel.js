// The graph of one node, with what goes with it: which of its runs is on show, the theme, and its place on the page.

import { QUANTITIES, StabilityGraph, finishRun, startRun } from "./graph.js";

// What stands in the place of a graph, by the class of the node.
export const EMPTY = {
  MemorizationGuard: "The graph is drawn while the sampler runs.",
  MemorizationGuardReport: "The graph is shown after the run.",
};
export const WIDGET = "stability_graph";
const MOST_RUNS = 10;

// A run is {name, node, run, traces, at}: `name` is prompt:sampler node:place in its list:number, `node` the id of the node that
// shows it, `run` what graph.js draws, `at` when it ended.

/**
 * The runs of a node of class `kind` with one more. A guard keeps the last ones, whatever prompt they are of. A report shows those of
 * its picture: ComfyUI puts it out again for every prompt that takes it from the cache.
 */
export function joined(runs, one, kind) {
  const belongs = (each) => each.name !== one.name && (kind === "MemorizationGuard" || promptOf(each) === promptOf(one));
  return [...runs.filter(belongs), one].slice(-MOST_RUNS);
}

export const promptOf = ({ name }) => String(name).split(":")[0];

/** The graph of one node, and what steps through its runs if there are several. */
export class Panel {
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
    this.#place = placeOf(this.#node);
    this.element = takeOver(this.#place, this.#node, WIDGET, this.element);
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
    leave(this.#place, this.element);
    this.#theme?.disconnect();
    this.#graph?.destroy();
    this.#graph = null;
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
    this.#runs = runs.map((one) => ({ ...one, run: finishRun(startRun(one), one.traces), kept: true }));
    this.#show(this.#runs.at(-1) ?? null);
  }

  /** Shows a new run, or what is new in a run. */
  take(one) {
    if (!this.#runs.includes(one)) {
      this.#runs = joined(this.#runs, one, this.#node.comfyClass);
      this.#show(one);
    } else if (one === this.#shown) this.#graph?.show(one.run);
  }

  /** Shows a message if there is no graph. */
  say(message) {
    if (!this.#shown) this.#graph?.clear(message);
  }

  #show(one) {
    this.#shown = one;
    const at = this.#runs.indexOf(one);
    const parts = [];
    if (this.#runs.length > 1) {
      const where = styled("span", { font: "11px/18px system-ui, sans-serif" });
      where.textContent = `run ${at + 1} of ${this.#runs.length}`;
      where.title = `sampler: node ${String(one.name).split(":").slice(1, -2).join(":")}`;
      parts.push(this.#step("‹", "earlier run", at - 1), where, this.#step("›", "later run", at + 1));
    }
    if (one?.kept && one.at) {
      const when = styled("span", { marginLeft: "auto", font: "11px/18px system-ui, sans-serif", opacity: "0.7" });
      when.textContent = `run of ${new Date(one.at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
      parts.push(when);
    }
    this.#bar.replaceChildren(...parts);
    this.#bar.hidden = !this.#bar.childElementCount;
    this.#bar.style.display = this.#bar.hidden ? "none" : "flex";
    if (one) this.#graph?.show(one.run);
    else this.#graph?.clear(EMPTY[this.#node.comfyClass]);
  }

  /** A button that shows another run, the one at place `to`. */
  #step(words, title, to) {
    const button = styled("button", {
      border: "0", padding: "1px 8px", borderRadius: "6px", font: "11px/16px system-ui, sans-serif", cursor: "pointer",
      color: "var(--input-text, #ddd)", background: "var(--comfy-input-bg, #222)",
    });
    button.type = "button";
    button.textContent = words;
    button.title = title;
    button.disabled = !(to in this.#runs);
    button.addEventListener("pointerdown", (event) => event.stopPropagation()); // or the node is dragged
    button.addEventListener("click", () => this.#show(this.#runs[to]));
    return button;
  }
}

export function styled(tag, style) {
  const element = document.createElement(tag);
  Object.assign(element.style, style);
  return element;
}

/** A field of text on a node. The text can be copied. */
export function textBox() {
  const element = styled("div", {
    padding: "4px 8px", borderRadius: "6px", overflow: "auto", whiteSpace: "pre-wrap", overflowWrap: "anywhere", userSelect: "text",
    font: "12px/16px system-ui, sans-serif", color: "var(--input-text, #ddd)", background: "var(--comfy-input-bg, #222)",
  });
  element.setAttribute("role", "status");
  element.addEventListener("pointerdown", (event) => event.stopPropagation()); // or the node is dragged
  return element;
}

const places = new Map(); // ids of graph and node -> element of a node that was removed

/** Where on the page the element of a node is. */
export const placeOf = (node) => `${node.graph?.id} ${node.id}`;

/**
 * Undo creates every node again. Nodes 2.0 then keep the element of the old node on the page: the widget `name` of the new node gets that
 * one, with what is in `element`. Gives the element that is the node's from now on.
 */
export function takeOver(place, node, name, element) {
  const old = places.get(place);
  places.delete(place);
  if (!old || old === element) return element;
  old.replaceChildren(...element.childNodes);
  for (const widget of node.widgets) if (widget.name === name) widget.element = old;
  return old;
}

/** To be called when a node is removed whose element was at `place`. */
export function leave(place, element) {
  if (element.isConnected) places.set(place, element);
}

/** To be called when another graph is loaded, whose nodes have the same ids. */
export function forgetPlaces() {
  places.clear();
}
