// The stability graph on the page of the WebUI, Forge and reForge: below a tab's gallery, while its task runs and after it.
//
// The host keeps the id of a tab's task in localStorage, which all pages of a browser share, and shows a progress bar while a page
// waits for its task. So a new bar says that a task of this page has begun; and where the page itself is new, one may be under way
// from before a reload. Only then is the server asked for events, and only until the task is done.

// By the version that the host puts into this file's address: a browser may have kept an older graph.js.
const { StabilityGraph, addStep, finishRun, startRun } = await import(`../js/graph.js${new URL(import.meta.url).search}`);

const PERIOD = 300; // milliseconds between an answer and the next question
const PATIENCE = 6; // failures in a row, after each of which it waits twice as long
const MOST_RUNS = 8; // as many as the server keeps
const STYLE = `
:host{display:block}
section{box-sizing:border-box;display:flex;flex-direction:column;gap:4px;height:300px;min-height:200px;overflow:hidden;resize:vertical}
header{display:flex;flex:none;flex-wrap:wrap;align-items:center;gap:4px;font:12px/20px system-ui,sans-serif;
 color:var(--body-text-color-subdued,gray)}
header span{margin-right:8px}
button{border:1px solid transparent;border-radius:6px;padding:0 8px;background:none;color:inherit;font:inherit;cursor:pointer}
button:hover,button[aria-pressed=true]{color:var(--body-text-color,inherit)}
button[aria-pressed=true]{border-color:var(--border-color-primary,gray)}
main{flex:1 1 0;min-height:0}
`;

/** The graph of one task, and a button for each run where there are several (batches, the second pass, a comparison). */
class Panel {
  #runs = new Map(); // name -> {title, run}
  #shown = null;
  #header = make("header");
  #graph;
  #theme;

  constructor(container) {
    const main = make("main");
    const section = make("section");
    section.setAttribute("aria-label", "Memorization Guard");
    section.append(this.#header, main);
    this.element = make("div");
    // The host calls every extension back whenever its page changes, which what happens in here is not.
    this.element.attachShadow({ mode: "open" }).append(make("style", STYLE), section);
    container.after(this.element);
    this.#theme = new MutationObserver(() => this.#followTheme());
    this.#theme.observe(document.body, { attributes: true, attributeFilter: ["class"] });
    this.#graph = new StabilityGraph(main);
    this.#followTheme();
  }

  remove() {
    this.#theme.disconnect();
    this.#graph.destroy();
    this.element.remove();
  }

  take({ kind, run: name, title, ...data }) {
    if (kind === "begin" || !this.#runs.has(name)) {
      this.#runs.delete(name);
      this.#runs.set(name, { title, run: startRun(data) });
      if (this.#runs.size > MOST_RUNS) this.#runs.delete(this.#runs.keys().next().value);
      this.#show(name);
    }
    const { run } = this.#runs.get(name);
    if (kind === "step") addStep(run, data);
    if (kind === "end") finishRun(run, data.traces);
    if (name === this.#shown) this.#graph.show(run);
  }

  /** No more will come, also of a run that was broken off. */
  end() {
    for (const { run } of this.#runs.values()) if (!run.finished) finishRun(run, []);
    this.#graph.show(this.#runs.get(this.#shown)?.run);
  }

  #show(name) {
    this.#shown = name;
    const names = this.#runs.size > 1 ? [...this.#runs.keys()] : [];
    const buttons = names.map((each, i) => {
      const button = make("button", this.#runs.get(each).title || `run ${i + 1}`);
      button.type = "button";
      button.setAttribute("aria-pressed", String(each === name));
      button.addEventListener("click", () => this.#show(each));
      return button;
    });
    this.#header.replaceChildren(make("span", "Memorization Guard"), ...buttons);
    this.#graph.show(this.#runs.get(name).run);
  }

  /** Gradio says when it is dark, and nothing when it is light. */
  #followTheme() {
    this.element.dataset.theme = document.body.classList.contains("dark") ? "dark" : "light";
    this.#graph.show(this.#runs.get(this.#shown)?.run);
  }
}

/** A tab that generates: which task of it is under way, and its panel. */
class Tab {
  #name;
  #container = null;
  #bar = null; // the host's progress bar, as long as it waits for a task
  #panel = null;
  #watch = null; // of the task that was begun last

  constructor(name) {
    this.#name = name;
  }

  /** Called after every change of the page, which is often. */
  look() {
    const container = gradioApp().querySelector(`#${this.#name}_gallery_container`);
    if (!container) return;
    const bar = container.parentNode.querySelector(":scope > .progressDiv");
    const begun = bar && bar !== this.#bar;
    const isNew = !this.#container;
    this.#container = container;
    this.#bar = bar;
    if (begun || isNew) this.#follow(localStorage.getItem(`${this.#name}_task_id`)).catch(complain);
  }

  /** Draws what the server tells of a task, until there is no more. */
  async #follow(task) {
    const watch = (this.#watch = {});
    this.#panel?.remove();
    this.#panel = null;
    if (!task) return;
    let cursor = 0;
    let failures = 0;
    while (failures < PATIENCE) {
      const answer = await ask(task, cursor);
      if (this.#watch !== watch) return;
      failures = answer ? 0 : failures + 1;
      if (answer) {
        cursor = answer.cursor;
        for (const event of answer.events) this.#take(event);
        // The server hears of a task later than the page, which waits as long as there is a bar.
        if (!answer.running && !answer.events.length && !this.#bar?.isConnected) break;
      }
      await new Promise((done) => setTimeout(done, PERIOD * 2 ** failures));
      if (this.#watch !== watch) return;
    }
    this.#panel?.end();
  }

  #take(event) {
    this.#panel ??= new Panel(this.#container);
    this.#panel.take(event);
  }
}

/** The server's answer, or null where there is none. Relative, as the host's own: the page may stand below a path. */
async function ask(task, cursor) {
  try {
    const question = new URLSearchParams({ task, cursor });
    const response = await fetch(`./memorization-guard/live?${question}`, { signal: AbortSignal.timeout(10000) });
    return response.ok ? await response.json() : null;
  } catch {
    return null; // The server is gone or slow: it is asked again.
  }
}

function make(tag, text = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

const complain = (error) => console.error("Memorization Guard cannot draw its graph:", error);

const tabs = ["txt2img", "img2img"].map((name) => new Tab(name));
const look = () => tabs.forEach((tab) => tab.look());
onUiUpdate(look);
look();
