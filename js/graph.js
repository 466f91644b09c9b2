// The stability graph: how unusual a prompt is, and the norms of a run, drawn as SVG while the run is sampled or afterwards.
//
// One file for the ComfyUI node, the WebUI panel and the HTML reports: a report contains its source, and the WebUI can ask the
// browser for the current version of one file only. It has no dependencies, and importing it changes nothing.
// memorization_guard/reports/graph.py draws the same graph as a picture. docs/graph.md says how to read it, docs/trace.md what a
// trace holds. Everything that comes from a run is put into the page as text, never as HTML.

export const QUANTITIES = ["evidence", "latent", "update", "denoised"];

const NORMS = QUANTITIES.slice(1);
const AXIS_TITLES = {
  evidence: "how unusual the prompt is", latent: "latent norm", update: "update norm", denoised: "predicted image norm",
};
const BUTTONS = { evidence: "evidence", latent: "latent", update: "update", denoised: "image" };
// The badge of each verdict, the worst verdict first.
const BADGES = {
  strong: "solid", "likely copy": "solid", mild: "outlined", corrected: "outlined", unscored: "muted", stable: "plain",
};
export const VERDICTS = Object.keys(BADGES);
const TRIGGERED = ["corrected", "likely copy", "mild", "strong"];
const NO_PROFILE = "no profile: not scored";
const COMMON = 0.1; // share of ordinary prompts that is shaded darker: nine of ten
const REACH = 10000; // the axis of evidence ends here where no references say how far they reach: one in so many
const BEYOND = 17; // height of the place above that axis for what is rarer than the references can tell
const MOST_STEPS = 10000; // a larger step number is an error of the sender
const REDRAW_MS = 50;

// Colours after Okabe & Ito (2008). Whatever a colour says is also said by dash, shape or text.
const LIGHT = {
  ground: "#ffffff", ink: "#1b2430", muted: "#5b6675", grid: "#e6eaef", band: "#d3e4f4", wide: "#edf4fa", reference: "#31689b",
  mean: "#8db5da", alarm: "#bf4600", corrected: "#007a5e", item0: "#1b2430", item1: "#b0307c", item2: "#806400", item3: "#5b48c9",
};
const DARK = {
  ground: "#161b22", ink: "#eef2f6", muted: "#9ba7b5", grid: "#29313b", band: "#1d3d5c", wide: "#192a3c", reference: "#8fc1ee",
  mean: "#4a80b3", alarm: "#ff9455", corrected: "#3ddcae", item0: "#eef2f6", item1: "#ff8fcb", item2: "#e3c14b", item3: "#b9adff",
};
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

// ---------------------------------------------------------------------------------------------------------------- the run

/** A live run, from what is known before its first step (`StabilityMonitor.outline`). */
export function startRun(outline) {
  const plan = outline ?? {};
  return {
    planned: isStep(plan.steps) && plan.steps > 0 ? plan.steps : null,
    bands: readBands(plan.bands),
    holding: [], // names of the bands that hold, as the steps tell
    thresholds: readThresholds(plan.thresholds),
    note: plan.note ? String(plan.note) : null,
    referenceCount: positive(plan.reference_count),
    pValueFloor: positive(plan.p_value_floor),
    first: isStep(plan.first) ? plan.first : 1, // number of the first image
    chosen: null, // index of the image that the reader looks at; the others are drawn faint
    items: [], // one an image of the batch
    finished: false,
  };
}

/** Adds one step (a `StepEvent`) to a live run. */
export function addStep(run, event) {
  if (!event || !isStep(event.step) || run.finished) return run;
  const step = event.step;
  const list = (name) => (Array.isArray(event[name]) ? event[name] : []);
  const batch = largest([0, ...["latent_norm", "update_norm", "denoised_norm", "state"].map((name) => list(name).length)]);
  for (let b = 0; b < batch; b++) {
    const item = (run.items[b] ??= newItem());
    item.sigma[step] = number(event.sigma);
    for (const name of NORMS) {
      const norms = list(`${name}_norm`);
      item[name][step] = number(norms[b]);
      if (b < norms.length && !Number.isFinite(item[name][step])) item.nonfinite ??= step;
    }
    for (const name of ["update", "denoised"]) item.scores[name][step] = number(list(`${name}_score`)[b]);
    item.mitigated[step] = list("mitigated")[b] === true;
    item.score = extremeOf(item.score, item.scores.update[step], Math.max);
    const pValue = number(list("p_value")[b]);
    if (Number.isFinite(pValue)) item.pValue = pValue;
    item.look = list("judged_by")[b] ?? item.look;
    if (isVerdict(list("state")[b])) item.verdict = event.state[b];
    if (TRIGGERED.includes(item.verdict)) item.trigger ??= step;
  }
  run.holding = list("bands");
  return run;
}

/** Ends a run. The traces, one an image of the batch, replace what the steps told. */
export function finishRun(run, traces) {
  const found = (Array.isArray(traces) ? traces : []).filter((trace) => trace && typeof trace === "object");
  run.finished = true;
  if (!found.length) return run;
  const scored = found.find((trace) => Object.keys(trace.bands ?? {}).length) ?? found[0];
  run.items = found.map(readTrace);
  run.bands = readBands(scored.bands);
  run.holding = Object.keys(run.bands); // a trace has no others
  if (scored.thresholds) run.thresholds = readThresholds(scored.thresholds);
  run.referenceCount = positive(scored.reference_count);
  run.pValueFloor = found.map((trace) => positive(trace.p_value_floor)).find((floor) => floor !== null) ?? null;
  run.note = found.map((trace) => trace.note).filter(Boolean).map(String)[0] ?? null;
  return run;
}

/** A finished run. */
export function runOf(traces) {
  return finishRun(startRun(null), traces);
}

/** The run in words: a line for each image, and the note. */
export function summarize(run) {
  const lines = [];
  const taken = stepsTaken(run);
  if (!run.finished) {
    lines.push(!taken ? "Sampling" : `Sampling, step ${taken}`);
    if (run.planned) lines[0] += taken ? ` of ${run.planned}` : `, ${run.planned} steps planned`;
  } else if (!taken) lines.push("No step was recorded");
  lines.push(...run.items.map((_, image) => summarizeImage(run, image)));
  const note = noteOf(run);
  if (note) lines.push(note);
  return lines.map((line) => line.replace(/\.$/, "")).join(".\n") + ".";
}

function summarizeImage(run, image) {
  const item = run.items[image];
  const parts = [item.verdict];
  if (item.verdict === "stable" && !run.finished) parts[0] += " so far";
  if (item.trigger !== null) parts.push(`triggered at step ${item.trigger}`);
  if (item.score !== null) parts.push(`S_mem ${scoreText(item.score)}`);
  if (item.pValue !== null) {
    const rare = rarity(item.pValue, run.pValueFloor);
    parts.push(`${rare.startsWith("rarer") ? "" : "as far as "}${rare} ordinary images`);
  }
  if (item.words.length) {
    parts.push(`called up by ${item.words.map((word) => `"${word}"`).join(", ")}${item.leftOut ? ", left out" : ""}`);
  }
  const corrected = item.mitigated.filter(Boolean).length;
  if (corrected) parts.push(`${corrected} ${corrected === 1 ? "step" : "steps"} corrected`);
  if (item.nonfinite !== null) parts.push(`not a number from step ${item.nonfinite}`);
  return `Image ${run.first + image}: ${parts.join(", ")}`;
}

/** Which words call up the images on show, in one line; empty where none were told. */
function wordsLine(run) {
  const told = run.items.flatMap(({ words, leftOut }, image) => {
    if (!words.length) return [];
    const number = run.items.length > 1 ? `${run.first + image} ` : "";
    return [`${number}called up by ${words.map((word) => `"${word}"`).join(", ")}${leftOut ? ", left out" : ""}`];
  });
  return told.join("; ");
}

/** The run with one image alone; the others are there, and empty, so that it keeps its number, its colour and its dash. */
function alone(run, image) {
  return { ...run, items: run.items.map((item, i) => (i === image ? item : newItem())) };
}

/** The values at a step: those of every image, in numbers and in words, and those of the reference runs. */
export function valuesAt(run, step, quantity) {
  const evidence = quantity === "evidence";
  const { low, high } = edgesOf(run, quantity, [step]);
  return {
    step,
    first: run.first,
    sigma: run.items.map((item) => number(item.sigma[step])).find(Number.isFinite) ?? NaN,
    low: low[0],
    high: high[0],
    items: run.items.map((item) => {
      const score = evidence ? jointOf(item, step) : number(item.scores[quantity]?.[step]);
      const rare = evidence && item.pValue !== null;
      const value = !evidence ? number(item[quantity][step]) : rare && step < seenOf(item) ? item.pValue : NaN;
      const words = rare ? (Number.isFinite(value) ? rarity(value, run.pValueFloor) : "-") : short(evidence ? score : value);
      return { value, words, corrected: item.mitigated[step] === true, score: rare ? NaN : score };
    }),
  };
}

/** The published method's score at a step, which update and predicted image both reach. */
const jointOf = (item, step) => Math.min(number(item.scores.update[step]), number(item.scores.denoised[step]));

/** Number of steps in which an image's latent was a number. */
const seenOf = (item) => Math.min(stepsOf(item), item.nonfinite === null ? Infinity : item.nonfinite + 1);
const stepsOf = (item) => Math.max(item.sigma.length, item.update.length);

/**
 * The edges of the band at `steps`, and what of it the axis makes room for. Norms are positive and their logarithms are about
 * normal, so the band is taken there: mean and standard deviation of the norm are those of a log-normal variable.
 */
function edgesOf(run, quantity, steps) {
  const band = run.holding.includes(quantity) ? run.bands[quantity] : null;
  const edges = { mean: [], low: [], high: [], inner: [] };
  for (const step of steps) {
    const mean = number(band?.mean[step]);
    const spread = Math.sqrt(Math.log1p((number(band?.std[step]) / mean) ** 2));
    const centre = Math.log(mean) - spread ** 2 / 2;
    const reach = run.thresholds.gamma * spread;
    edges.mean.push(mean);
    edges.low.push(Math.exp(centre - reach));
    edges.high.push(Math.exp(centre + reach));
    edges.inner.push(Math.exp(centre - Math.min(reach, 0.8)), Math.exp(centre + Math.min(reach, 0.8)));
  }
  return edges;
}

function newItem() {
  return {
    verdict: "unscored", score: null, pValue: null, look: null, trigger: null, nonfinite: null, words: [], leftOut: false,
    sigma: [], latent: [], update: [], denoised: [], scores: { update: [], denoised: [] }, mitigated: [],
  };
}

function readTrace(trace) {
  const steps = trace.steps ?? {};
  const list = (name) => (Array.isArray(steps[name]) ? steps[name].slice(0, MOST_STEPS).map(number) : []);
  return {
    verdict: isVerdict(trace.verdict) ? trace.verdict : "unscored",
    score: Number.isFinite(trace.score) ? trace.score : null,
    pValue: Number.isFinite(trace.p_value) ? trace.p_value : null,
    look: trace.judged_by ?? null,
    trigger: isStep(trace.trigger_step) ? trace.trigger_step : null,
    nonfinite: isStep(trace.nonfinite_step) ? trace.nonfinite_step : null,
    words: Array.isArray(trace.words?.words) ? trace.words.words.map(String) : [],
    leftOut: trace.words?.left_out === true,
    sigma: list("sigma"),
    latent: list("latent_norm"),
    update: list("update_norm"),
    denoised: list("denoised_norm"),
    scores: { update: list("update_score"), denoised: list("denoised_score") },
    mitigated: Array.isArray(steps.mitigated) ? steps.mitigated : [],
  };
}

function readBands(bands) {
  const read = {};
  for (const name of NORMS) {
    const { mean, std } = bands?.[name] ?? {};
    if (Array.isArray(mean) && Array.isArray(std)) {
      read[name] = { mean: mean.slice(0, MOST_STEPS).map(number), std: std.slice(0, MOST_STEPS).map(number) };
    }
  }
  return read;
}

function readThresholds(thresholds) {
  const { method, false_positive_rate, tau_mild, tau_strong, gamma } = thresholds ?? {};
  return {
    published: method === "published",
    rate: positive(false_positive_rate) ?? 0.005,
    mild: positive(tau_mild) ?? 3,
    strong: positive(tau_strong) ?? 14,
    gamma: positive(gamma) ?? 3,
  };
}

function noteOf(run) {
  if (run.note) return run.note;
  return Object.keys(run.bands).length || run.items.some((item) => item.verdict !== "unscored") ? null : NO_PROFILE;
}

const isVerdict = (value) => Object.hasOwn(BADGES, value);
const isStep = (value) => Number.isInteger(value) && value >= 0 && value < MOST_STEPS;
// Nothing that is drawn can be negative.
const number = (value) => (typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : NaN);
const positive = (value) => (number(value) > 0 ? value : null);
const stepsTaken = (run) => largest([0, ...run.items.map(stepsOf)]);
const finite = (values) => values.filter(Number.isFinite);
const largest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const smallest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);

/** The more extreme of a value so far, null at first, and a new one that may be NaN. */
const extremeOf = (before, value, choose) => (Number.isFinite(value) ? choose(before ?? value, value) : before);

/**
 * A share of ordinary images in words: 0.00005 is "1 in 20,000", or "rarer than 1 in 20,000" if the references can carry no
 * smaller one than `floor`.
 */
export function rarity(share, floor = null) {
  if (share >= 0.5) return "most";
  const count = 1 / Math.max(share, floor ?? 1e-12);
  const digits = 10 ** Math.max(0, Math.floor(Math.log10(count)) - 1);
  // Both have seven digits.
  const beyond = floor !== null && share <= floor * (1 + 1e-6) ? "rarer than " : "";
  return `${beyond}1 in ${grouped(Math.round(count / digits) * digits)}`;
}

/** A whole number with commas, or in few letters: 20,000 or 20k. */
function grouped(count, few = false) {
  const words = String(count).replace(/\B(?=(\d{3})+$)/g, ",");
  return few ? words.replace(/,000,000$/, "M").replace(/,000$/, "k") : words;
}

// ------------------------------------------------------------------------------------------------------------- the layout

/**
 * Everything the plot shows, in pixels and in the order it is painted: `shapes` of `[tag, attributes, text]`, the number of
 * `steps` on the axis, how many of them were `taken`, and where the steps (`x`) and the images at a step (`at`) lie. Where there
 * is nothing to draw, `empty` says why.
 */
export function layout(run, { width, height, quantity, compact = false }) {
  const live = !run.finished;
  const taken = stepsTaken(run);
  const steps = live ? Math.max(run.planned ?? nice(Math.max(taken, 10), Math.ceil), taken) : taken;
  const frame = { run, live, taken, steps, width, height, compact, many: run.items.length > 1, top: compact ? 8 : 18 };
  Object.assign(frame, { bottom: height - 21, base: height - 20.5 });
  if (quantity !== "evidence") return layoutNorm(frame, quantity);
  return run.thresholds.published ? layoutScores(frame) : layoutEvidence(frame);
}

/** How rare the prompt is among ordinary ones, of every image, from its verdict on through the steps. */
function layoutEvidence(frame) {
  const { run, live, width, compact, many, top, bottom } = frame;
  const judged = run.items.flatMap(({ pValue }, index) => (pValue === null ? [] : [{ index, pValue }]));
  if (!judged.length && !(live && run.pValueFloor)) {
    const waits = live && !frame.taken && !run.note;
    const empty = waits ? "waiting for the first step" : "not judged: how unusual the prompt is is not known";
    return { shapes: [], steps: 0, taken: frame.taken, empty };
  }
  const floor = run.pValueFloor ?? 0;
  const limit = 1 / Math.max(run.thresholds.rate, floor);
  const rarest = 1 / Math.max(smallest(judged.map(({ pValue }) => pValue)), 1e-12);
  const most = floor ? 1 / floor : Math.max(REACH, 1.3 * limit, judged.length ? rarest : 0);
  const range = { low: 1, high: most, log: true };
  const scaleTop = top + (floor ? BEYOND : 0);
  const y = (count) => yOf(range, count, scaleTop, bottom);
  const isBeyond = (pValue) => floor > 0 && pValue <= floor * (1 + 1e-6);
  const level = (pValue) => (isBeyond(pValue) ? top + BEYOND / 2 : y(1 / Math.max(pValue, 1e-12)));

  const groups = groupsOf(judged.map(({ index, pValue }) => ({ index, y: level(pValue) })));
  const labels = many ? groups.map(({ images }) => numbersOf(images.map((index) => run.first + index))) : [];
  const room = Math.ceil((12 * Math.log10(most)) / (bottom - scaleTop)); // decades that a label takes
  const ticks = [...Array(12).keys()].map((n) => 10 ** (n + 1)).filter((tick, n) => tick <= most && (n + 1) % room === 0);
  const names = ticks.map((tick) => `1 in ${grouped(tick, compact)}`);
  const left = Math.round(10 + 6 * largest(["rarer", ...names].map((name) => name.length)));
  const right = width - 12 - (labels.length ? 6.5 * largest(labels.map((label) => label.length)) : 0);
  const apart = Math.min(11, (0.3 * (right - left)) / Math.max(1, ...groups.map(({ images }) => images.length)));
  const first = left + 9;
  const begin = first + apart * Math.max(0, ...groups.map(({ images }) => images.length - 1)) + 12;
  const x = (i) => begin + ((right - begin) * i) / Math.max(frame.steps - 1, 1);

  const pen = penOf();
  const common = y(Math.min(1 / COMMON, limit));
  for (const [role, to] of [["wide", y(limit)], ["band", common]]) {
    pen.area(role, [[left, bottom], [right, bottom], [right, to], [left, to]]);
  }
  ticks.forEach((tick, i) => pen.tick(left, right, y(tick), names[i]));
  if (floor) {
    pen.line("axis", [[left, Math.round(scaleTop) + 0.5], [right, Math.round(scaleTop) + 0.5]]);
    pen.text("tick", [left - 6, top + BEYOND / 2 + 4], "rarer", "end");
  }
  pen.steps(frame, left, right, x);
  if (!compact) pen.text("tick", [right, 12], AXIS_TITLES.evidence, "end");
  pen.line("threshold", [[left, Math.round(y(limit)) + 0.5], [right, Math.round(y(limit)) + 0.5]]);

  // Words stand where no image's line goes through them, if there is such a place.
  const free = (at) => groups.every((group) => Math.abs(group.y - (at - 4)) >= 10);
  const threshold = [y(limit) - 5, y(limit) + 13].find(free) ?? (many ? NaN : y(limit) - 5);
  const triggers = `triggers from ${rarity(1 / limit)} on`;
  if (Number.isFinite(threshold)) pen.text("label-trigger", [right - 4, threshold], triggers, "end");
  const ordinary = [common + 13, bottom - 5].find((at) => at <= bottom - 3 && free(at) && !(Math.abs(at - threshold) < 12));
  if (ordinary) pen.text("tick", [right - 4, ordinary], compact ? "9 of 10 ordinary" : "9 of 10 ordinary prompts", "end");

  const size = dotSize(frame, right - begin);
  for (const { images, y: at } of groups) {
    const one = images.length === 1;
    const look = { ...(one ? styleOf(images[0]) : { style: "--mg-own:var(--mg-ink)" }), ...faint(run, images) };
    const seen = largest(images.map((index) => seenOf(run.items[index])));
    if (seen > 0) pen.line("run", [[first, at], [x(seen - 1), at]], look);
    for (let i = 0; i < seen; i++) {
      if (images.some((index) => run.items[index].mitigated[i] === true)) pen.dot("corrected", [x(i), at], size);
    }
    for (const index of images) {
      const { nonfinite } = run.items[index];
      if (nonfinite !== null && nonfinite < frame.steps) pen.line("broken", [[x(nonfinite), at - 6], [x(nonfinite), at + 6]]);
    }
    if (live && seen > 0) pen.dot("end", [x(seen - 1), at], 3, { style: look.style });
    images.forEach((index, i) => pen.mark(run.items[index], [first + i * apart, at], faint(run, [index])));
  }
  if (many) {
    const ends = groups.map((group, i) => ({ ...group, label: labels[i] }));
    for (const { images, label, y: at } of spread(ends, top + 4, bottom - 3)) {
      const style = images.length === 1 ? styleOf(images[0]).style : "--mg-own:var(--mg-ink)";
      pen.text("item", [right + 6, at + 4], label, "start", { style });
    }
  }
  const at = (index, step) => {
    const { pValue } = run.items[index];
    return pValue !== null && step < seenOf(run.items[index]) ? level(pValue) : NaN;
  };
  return { shapes: pen.shapes, steps: frame.steps, taken: frame.taken, x, at, left: begin, right, top, bottom: frame.base };
}

/** With the published method: the distance from the reference that update and predicted image both reach, step by step. */
function layoutScores(frame) {
  const { run } = frame;
  const steps = [...Array(frame.steps).keys()];
  const curves = run.items.map((item) => steps.map((i) => jointOf(item, i)));
  const { mild, strong } = run.thresholds;
  const values = finite(curves.flat());
  if (!values.length && !frame.live) {
    const empty = "not judged: the published method holds for the profile's own sampler and schedule";
    return { shapes: [], steps: 0, taken: frame.taken, empty };
  }
  const range = { low: 0, high: Math.max(1.4 * mild, Math.min(1.15 * largest([0, ...values]), 3 * strong)), log: false };
  const name = (value) => `${short(value)} sd`;
  return layoutCurves(frame, curves, range, "distance from ordinary runs", name, ({ pen, left, right, y }) => {
    pen.area("band", [[left, y(0)], [right, y(0)], [right, y(mild)], [left, y(mild)]]);
    for (const [limit, words] of [[mild, `triggers above ${mild} sd`], [strong, `strong above ${strong} sd`]]) {
      if (limit > range.high) continue;
      pen.line("threshold", [[left, y(limit)], [right, y(limit)]]);
      pen.text("label-trigger", [right - 4, y(limit) + 13], words, "end");
    }
  });
}

/** A norm over the steps, with the band of ordinary runs where it holds for this run. */
function layoutNorm(frame, quantity) {
  const { run, live, taken } = frame;
  const steps = [...Array(frame.steps).keys()];
  const curves = run.items.map((item) => steps.map((i) => number(item[quantity][i])));
  const { mean, low, high, inner } = edgesOf(run, quantity, steps);
  const range = rangeOf(curves.flat(), [...mean, ...inner]);
  if (range === null) {
    const nothing = live ? "waiting for the first step" : "no step was recorded";
    return { shapes: [], steps: 0, taken, empty: taken ? "no norm of this run is a number" : nothing };
  }
  const title = AXIS_TITLES[quantity] + (range.log ? ", log scale" : "");
  return layoutCurves(frame, curves, range, title, short, ({ pen, x, y }) => {
    for (const part of stretches(high)) {
      const edge = [...part.map((i) => [x(i), y(high[i])]), ...part.map((i) => [x(i), y(low[i])]).reverse()];
      if (part.length > 1) pen.area("band", edge);
      else pen.line("band-line", edge);
    }
    pen.curve("mean", mean, x, y);
  });
}

/** Curves over the steps. `behind` draws what lies behind them. */
function layoutCurves(frame, curves, range, title, name, behind) {
  const { run, live, many, width, height, compact, bottom, base } = frame;
  const ticks = ticksOf(range, height < 90 ? 1 : height < 150 ? 2 : 3);
  const left = Math.round(10 + 6.3 * largest(ticks.map((tick) => name(tick).length)));
  const right = width - (many ? 22 : 12);
  const top = 18; // the marks have their words above
  const x = (i) => left + ((right - left) * i) / Math.max(frame.steps - 1, 1);
  const y = (value) => yOf(range, value, top, bottom);
  const pen = penOf();
  behind({ pen, left, right, x, y });
  for (const value of ticks) pen.tick(left, right, y(value), name(value));
  pen.steps(frame, left, right, x);

  const marks = marksOf(run, x, right);
  for (const { role, at, words, from } of marks) {
    pen.line(role, [[at, top - 3], [at, base]]);
    if (words) pen.text(`label-${role}`, [from, 12], words);
  }
  const shown = compact ? "" : title;
  if (marks.every((mark) => !mark.words || mark.to + 8 < right - widthOf(shown))) pen.text("tick", [right, 12], shown, "end");
  curves.forEach((values, index) => pen.curve("run", values, x, y, { ...styleOf(index), ...faint(run, [index]) }));
  curves.forEach((values, index) => {
    values.forEach((value, i) => {
      if (run.items[index].mitigated[i] === true && Number.isFinite(value)) {
        pen.dot("corrected", [x(i), y(value)], dotSize(frame, right - left));
      }
    });
  });
  const ends = curves.flatMap((values, index) => {
    const last = values.findLastIndex(Number.isFinite);
    return last < 0 ? [] : [{ index, x: x(last), y: y(values[last]) }];
  });
  if (live) for (const end of ends) pen.dot("end", [end.x, end.y], 3, { style: styleOf(end.index).style });
  for (const end of many ? spread(ends, top + 4, base - 4) : []) {
    pen.text("item", [end.x + 6, end.y + 4], String(run.first + end.index), "start", { style: styleOf(end.index).style });
  }
  const at = (index, step) => y(curves[index][step]);
  return { shapes: pen.shapes, steps: frame.steps, taken: frame.taken, x, y, at, left, right, top, bottom: base };
}

/** Collects shapes. */
function penOf() {
  const shapes = [];
  const pen = {
    shapes,
    line: (role, points, extra) => shapes.push(["polyline", { class: `mg-${role}`, points: path(points), ...extra }]),
    area: (role, points) => shapes.push(["polygon", { class: `mg-${role}`, points: path(points) }]),
    dot: (role, at, r, extra) =>
      shapes.push(["circle", { class: `mg-${role}`, cx: round(at[0]), cy: round(at[1]), r: round(r), ...extra }]),
    text: (role, at, words, anchor = "start", extra = {}) =>
      words && shapes.push(
        ["text", { class: `mg-text mg-${role}`, x: round(at[0]), y: round(at[1]), "text-anchor": anchor, ...extra }, words],
      ),
    tick(left, right, at, words) {
      pen.line("grid", [[left, Math.round(at) + 0.5], [right, Math.round(at) + 0.5]]);
      pen.text("tick", [left - 6, at + 4], words, "end");
    },
    /** The mark of an image's verdict, round at the first evaluation, a diamond where the network was asked. */
    mark(item, [x, y], extra) {
      const role = `mark-${BADGES[item.verdict]}`;
      if (item.look !== "asked") return pen.dot(role, [x, y], 4.6, extra);
      const points = path([[x - 6, y], [x, y - 6], [x + 6, y], [x, y + 6]]);
      return shapes.push(["polygon", { class: `mg-${role}`, points, ...extra }]);
    },
    /** A line with gaps where there is no value. */
    curve(role, values, x, y, extra) {
      for (const part of stretches(values)) {
        const points = part.map((i) => [x(i), y(values[i])]);
        if (points.length > 1) pen.line(role, points, extra);
        else pen.dot(`${role}-point`, points[0], 1.8, extra);
      }
    },
    steps({ steps, base }, left, right, x) {
      pen.line("axis", [[left, base], [right, base]]);
      const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000].find((n) => steps / n <= (right - left) / 45) ?? 5000;
      for (let i = 0; i < steps; i += every) {
        const at = Math.round(x(i)) + 0.5;
        pen.line("axis", [[at, base], [at, base + 3]]);
        if (i === 0 || at < right - 34) pen.text("tick", [at, base + 15], String(i), "middle"); // "step" stands at the right end
      }
      pen.text("tick", [right, base + 15], "step", "end");
    },
  };
  return pen;
}

const faint = (run, images) => (run.chosen === null || images.includes(run.chosen) ? {} : { opacity: 0.3 });
const dotSize = ({ many, steps }, wide) => Math.min(many ? 1.8 : 2.6, Math.max(1.2, (0.3 * wide) / Math.max(steps, 1)));

/** Images whose lines would lie on one another, as those of one prompt do, share one: from top to bottom. */
function groupsOf(levels) {
  const groups = [];
  for (const { index, y } of [...levels].sort((a, b) => a.y - b.y || a.index - b.index)) {
    if (groups.length && y - groups.at(-1).y < 5) groups.at(-1).images.push(index);
    else groups.push({ y, images: [index] });
  }
  for (const { images } of groups) images.sort((a, b) => a - b);
  return groups;
}

/** The numbers of images in few letters: "1-4, 7", or how many they are. */
function numbersOf(images) {
  const parts = [];
  for (const image of images) {
    if (parts.length && parts.at(-1)[1] === image - 1) parts.at(-1)[1] = image;
    else parts.push([image, image]);
  }
  const said = parts.map(([from, to]) => (from === to ? `${from}` : to === from + 1 ? `${from}, ${to}` : `${from}-${to}`));
  const words = said.join(", ");
  return words.length <= 8 ? words : `${images.length} images`;
}

/** What the plot shows: pairs of a role and the words for it. */
export function legendOf(run, quantity, compact) {
  const legend = [];
  const many = run.items.length > 1;
  const evidence = quantity === "evidence";
  const looks = new Set(run.items.filter((item) => item.pValue !== null).map((item) => item.look));
  if (evidence && looks.has("first")) legend.push(["first", compact ? "first look" : "judged at the first evaluation"]);
  if (evidence && looks.has("asked")) {
    legend.push(["asked", compact ? "asked" : "judged by what the network was asked"]);
  }
  if (!evidence && run.items.length === 1 && !compact) legend.push(["run", "this run"]);
  if (!evidence && many && run.items.some((item) => item.trigger !== null)) legend.push(["trigger", "trigger"]);
  if (many && run.items.some((item) => item.nonfinite !== null)) legend.push(["broken", "not a number"]);
  if (run.items.some((item) => item.mitigated.includes(true))) legend.push(["corrected", "corrected"]);
  if (evidence) return legend;
  const runs = run.referenceCount ? `${run.referenceCount} ` : "";
  if (run.bands[quantity] && run.holding.includes(quantity)) {
    legend.push(["band", compact ? "ordinary" : `${runs}ordinary runs, ± ${run.thresholds.gamma} sd`]);
  } else if (run.referenceCount && stepsTaken(run)) legend.push(["none", compact ? "no band holds" : "no band holds for this run"]);
  return legend;
}

/**
 * The vertical marks, one for each step at which something happened: role, where the line is (`at`), and, if there is room above
 * the plot, its `words` and where they are (`from`, `to`).
 */
function marksOf(run, x, right) {
  const found = new Map();
  run.items.forEach((item, index) => {
    for (const [role, step] of [["trigger", item.trigger], ["broken", item.nonfinite]]) {
      if (step === null) continue;
      const { who } = found.get(`${role} ${step}`) ?? { who: [] };
      found.set(`${role} ${step}`, { role, step, who: [...who, run.first + index] });
    }
  });
  const placed = [];
  return [...found.values()].sort((a, b) => a.step - b.step).map(({ role, step, who }) => {
    const at = Math.round(x(step)) + 0.5;
    const what = role === "trigger" ? `trigger at step ${step}` : `not a number from step ${step}`;
    const words = run.items.length > 1 ? who.join(", ") : what;
    const wide = widthOf(words);
    const fits = (from) => from >= 0 && from + wide <= right + 8 && placed.every((p) => from + wide + 4 < p.from || from > p.to + 4);
    const from = [at - 1, at - wide].find(fits);
    if (from === undefined) return { role, at };
    placed.push({ from, to: from + wide });
    return { role, at, words, from, to: from + wide };
  });
}

/** What stands at the curves' ends, moved apart where they would overlap. */
function spread(ends, top, bottom) {
  const sorted = ends.map((end) => ({ ...end, y: Math.max(end.y, top) })).sort((a, b) => a.y - b.y);
  for (let i = 1; i < sorted.length; i++) sorted[i].y = Math.max(sorted[i].y, sorted[i - 1].y + 12);
  for (let i = sorted.length - 1; i >= 0; i--) {
    sorted[i].y = Math.min(sorted[i].y, i === sorted.length - 1 ? bottom : sorted[i + 1].y - 12);
  }
  return sorted.filter((end) => end.y >= top);
}

/**
 * The vertical axis. What it makes room for of the band, known beforehand, decides it. A run that goes beyond widens the axis to
 * the next round number, so that the axis rarely moves while the run is drawn.
 */
export function rangeOf(values, ofBand) {
  const band = finite(ofBand);
  const known = band.length ? band : finite(values);
  if (!known.length) return null;
  const cap = band.length ? 20 * largest(band) || 1 : Infinity; // a latent that exploded must not hide the band
  const most = largest(known);
  const log = isWide(known);
  const range = { low: log ? Infinity : 0, high: 0, log };
  if (band.length && log) {
    Object.assign(range, { low: Math.max(smallest(band.filter((value) => value > 0)), most / 1000) / 1.15, high: most * 1.15 });
  } else if (band.length) {
    const least = smallest(band);
    if (least >= most / 2) range.low = least - 0.08 * (most - least) - 1e-3 * most;
    range.high = most + 0.08 * (most - range.low);
  }
  const drawn = finite(values).map((value) => Math.min(value, cap));
  if (largest(drawn) > range.high) range.high = nice(1.02 * largest(drawn), Math.ceil);
  range.high ||= 1;
  const least = log ? Math.max(smallest(drawn), range.high / 1000) : smallest(drawn);
  if (least < range.low) range.low = nice(0.98 * least, Math.floor);
  return range;
}

/**
 * Whether values stretch over more than a decade, where a linear axis would press the smaller ones flat. Values near zero in a few
 * steps do not count.
 */
function isWide(values) {
  const bulk = quantile(values, 0.1);
  return bulk > 0 && bulk < largest(values) / 12;
}

function yOf(range, value, top, bottom) {
  if (!Number.isFinite(value)) return NaN;
  const to = range.log ? Math.log : (v) => v;
  const clipped = Math.min(Math.max(value, range.low), range.high);
  return bottom - ((bottom - top) * (to(clipped) - to(range.low))) / (to(range.high) - to(range.low));
}

/** Round values: at least `want` on a linear axis, at most `2 * want + 1` on a logarithmic one. */
function ticksOf({ low, high, log }, want) {
  if (log) {
    const decades = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++) decades.push(decade);
    for (const digits of [[1, 2, 5], [1, 3], [1]]) {
      const ticks = decades.flatMap((decade) => digits.map((digit) => digit * 10 ** decade)).filter((t) => t >= low && t <= high);
      if (ticks.length <= 2 * want + 1 || digits.length === 1) return ticks;
    }
  }
  const unit = 10 ** Math.floor(Math.log10((high - low) / want));
  const step = unit * [5, 2, 1].find((n) => (high - low) / (unit * n) >= want);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(n * step);
  return ticks;
}

/** The next of 1, 1.5, 2, 3, 4, 5, 7, 10 ... above (`Math.ceil`) or below (`Math.floor`). */
function nice(value, towards) {
  if (!(value > 0)) return 0;
  const unit = 10 ** Math.floor(Math.log10(value));
  const round = [1, 1.5, 2, 3, 4, 5, 7, 10].map((digit) => digit * unit);
  return (towards === Math.ceil ? round.find((v) => v >= value) : round.findLast((v) => v <= value)) ?? value;
}

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = share * (sorted.length - 1);
  const i = Math.floor(at);
  return sorted[i] + (at - i) * ((sorted[i + 1] ?? sorted[i]) - sorted[i]);
}

/** The steps at which there are values, in stretches without a gap. */
function stretches(values) {
  const parts = [];
  values.forEach((value, i) => {
    if (!Number.isFinite(value)) return;
    if (i > 0 && Number.isFinite(values[i - 1])) parts.at(-1).push(i);
    else parts.push([i]);
  });
  return parts;
}

const styleOf = (index) => ({
  style: `--mg-own:var(--mg-item${index % 4})`,
  "stroke-dasharray": DASHES[(index + Math.floor(index / 4)) % 4],
});
const round = (value) => Math.round(value * 10) / 10;
const path = (points) => points.map(([x, y]) => `${round(x)},${round(y)}`).join(" ");
const widthOf = (words) => 6 * words.length; // about, at 11 pixels; the font is not known here

/** A number for people: about three digits. */
function short(value) {
  if (!Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(0).replace("+", "");
  return String(+(size < 1 ? value.toPrecision(3) : value.toFixed(size >= 1000 ? 0 : size >= 10 ? 1 : 2)));
}

const scoreText = (value) => (value < 1000 ? value.toFixed(1) : "over 1000");

// --------------------------------------------------------------------------------------------------------------- the view

const variables = (palette) => Object.entries(palette).map(([name, colour]) => `--mg-${name}:${colour};`).join("");

const STYLE = `
.mg-view{${variables(LIGHT)}color-scheme:light}
@media (prefers-color-scheme:dark){.mg-view:not([data-mg-theme=light]){${variables(DARK)}color-scheme:dark}}
.mg-view[data-mg-theme=dark]{${variables(DARK)}color-scheme:dark}
.mg-view,.mg-view *{box-sizing:border-box}
.mg-view{position:relative;display:flex;flex-direction:column;width:100%;height:100%;min-height:150px;min-width:0;padding:8px 8px 4px;
 overflow:hidden;border-radius:8px;background:var(--mg-ground);color:var(--mg-ink);text-align:left;
 font:400 12px/16px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-variant-numeric:tabular-nums;letter-spacing:normal}
.mg-head{display:flex;flex:none;flex-wrap:wrap;align-items:center;gap:4px 10px;min-height:24px}
.mg-verdicts{display:flex;flex-wrap:wrap;align-items:center;gap:2px 12px;min-width:0;max-height:42px;overflow-y:auto}
.mg-verdict{display:inline-flex;align-items:center;gap:6px;white-space:nowrap}
.mg-view button.mg-image{all:unset;display:inline-flex;align-items:center;gap:6px;border-radius:99px;white-space:nowrap;cursor:pointer}
.mg-view button.mg-image[aria-pressed=true]{background:var(--mg-band)}
.mg-view button.mg-image:focus-visible{outline:2px solid var(--mg-reference);outline-offset:-2px}
.mg-badge{border:1px solid var(--mg-muted);border-radius:99px;padding:1px 9px;color:var(--mg-ink);line-height:16px}
.mg-badge-muted{color:var(--mg-muted)}
.mg-badge-outlined{border-color:var(--mg-alarm);color:var(--mg-alarm)}
.mg-badge-solid{border-color:var(--mg-alarm);background:var(--mg-alarm);color:var(--mg-ground);font-weight:600}
.mg-status{color:var(--mg-muted);white-space:nowrap}
.mg-choices{display:flex;margin-left:auto;border:1px solid var(--mg-grid);border-radius:6px;overflow:hidden}
.mg-view button.mg-choice{all:unset;box-sizing:border-box;flex:none;height:22px;padding:0 9px;color:var(--mg-muted);cursor:pointer;
 font:400 12px/22px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;text-align:center;white-space:nowrap}
.mg-view button.mg-choice+button.mg-choice{border-left:1px solid var(--mg-grid)}
.mg-view button.mg-choice:hover{color:var(--mg-ink)}
.mg-view button.mg-choice[aria-pressed=true]{background:var(--mg-band);color:var(--mg-ink)}
.mg-view button.mg-choice:focus-visible{outline:2px solid var(--mg-reference);outline-offset:-2px}
.mg-plot{position:relative;flex:1 1 0;min-height:60px;margin-top:2px}
.mg-svg{position:absolute;inset:0;display:block;overflow:hidden;stroke-linejoin:round;stroke-linecap:round}
.mg-cursor{position:absolute;inset:0;border-radius:4px;cursor:crosshair;touch-action:pan-y;outline:none}
.mg-cursor:focus-visible{outline:2px solid var(--mg-reference);outline-offset:-1px}
.mg-empty{position:absolute;inset:0;display:flex;align-items:center;justify-content:center;color:var(--mg-muted);text-align:center;
 pointer-events:none}
.mg-readout{position:absolute;display:grid;grid-auto-columns:max-content;gap:0 10px;padding:4px 8px;border:1px solid var(--mg-grid);
 border-radius:6px;background:var(--mg-ground);box-shadow:0 2px 8px #0003;font-size:11px;line-height:14px;pointer-events:none;
 white-space:nowrap}
.mg-readout-head{grid-column:1/-1;color:var(--mg-muted)}
.mg-readout-name{display:flex;align-items:center;gap:5px}
.mg-readout-value{text-align:right}
.mg-readout-note{color:var(--mg-muted)}
.mg-reference-text{color:var(--mg-reference)}
.mg-legend{display:flex;flex:none;flex-wrap:wrap;gap:0 14px;color:var(--mg-muted);font-size:11px;line-height:14px}
.mg-legend>span{display:flex;align-items:center;gap:5px;white-space:nowrap}
.mg-words{flex:none;overflow:hidden;font-size:12px;line-height:16px;text-overflow:ellipsis;white-space:nowrap}
.mg-note{flex:none;display:-webkit-box;overflow:hidden;color:var(--mg-muted);font-size:11px;line-height:14px;-webkit-box-orient:vertical;
 -webkit-line-clamp:8}
.mg-readout[hidden],.mg-legend[hidden],.mg-words[hidden],.mg-note[hidden],.mg-empty[hidden]{display:none}
.mg-live{position:absolute;width:1px;height:1px;margin:-1px;overflow:hidden;clip-path:inset(50%);white-space:pre-line}
.mg-swatch{flex:none;display:block}
.mg-low .mg-verdicts{max-height:20px}
.mg-narrow{padding:6px 6px 2px}
.mg-narrow .mg-head{gap:4px 6px}
.mg-narrow .mg-verdicts{gap:2px 6px;font-size:11px}
.mg-narrow .mg-badge{padding:1px 6px}
.mg-narrow .mg-legend{gap:0 8px;line-height:12px}
.mg-narrow .mg-legend>span{gap:3px}
.mg-view.mg-narrow button.mg-choice{padding:0 4px;font-size:11px}
.mg-text{font-size:11px;fill:var(--mg-muted)}
.mg-label-trigger{fill:var(--mg-alarm)}
.mg-item{fill:var(--mg-own);font-weight:600}
.mg-wide{fill:var(--mg-wide)}.mg-band,.mg-key-band{fill:var(--mg-band)}.mg-band-line{stroke:var(--mg-band);stroke-width:3;fill:none}
.mg-grid,.mg-axis,.mg-mean,.mg-trigger,.mg-broken,.mg-run{fill:none}
.mg-grid{stroke:var(--mg-grid);shape-rendering:crispEdges}.mg-axis{stroke:var(--mg-muted);shape-rendering:crispEdges}
.mg-mean{stroke:var(--mg-mean);stroke-width:1.2}.mg-mean-point{fill:var(--mg-mean)}
.mg-trigger,.mg-threshold{fill:none;stroke:var(--mg-alarm);shape-rendering:crispEdges}
.mg-mark-plain{fill:var(--mg-reference);stroke:var(--mg-ground)}.mg-mark-solid{fill:var(--mg-alarm);stroke:var(--mg-ground)}
.mg-mark-outlined{fill:var(--mg-ground);stroke:var(--mg-alarm);stroke-width:2}.mg-mark-muted{fill:var(--mg-muted);stroke:var(--mg-ground)}
.mg-key-look{fill:var(--mg-muted)}
.mg-broken{stroke:var(--mg-muted);stroke-dasharray:2 3}
.mg-run{stroke:var(--mg-own);stroke-width:1.8}.mg-run-point,.mg-end{fill:var(--mg-own);stroke:none}
.mg-corrected,.mg-key-corrected{fill:var(--mg-corrected)}
.mg-rule{stroke:var(--mg-muted);shape-rendering:crispEdges}
.mg-value{fill:var(--mg-own);stroke:var(--mg-ground);stroke-width:1.5}
`;

/**
 * The graph in a page. It fills `container`, which should have at least 260 x 160 pixels. `onQuantity` is called when the user
 * chooses another quantity. `compact` leaves out what a node has no room for.
 */
export class StabilityGraph {
  #container;
  #compact;
  #quantity = QUANTITIES[0];
  #run = null;
  #message = "no run yet";
  #told = null; // what screen readers were told last
  #timer = null;
  #drawnAt = -Infinity;
  #plot = null; // the layout on show
  #step = null; // under the cursor
  #image = null; // of a batch, the one that is shown alone
  #parts = {};
  #watchers = [];

  constructor(container, { onQuantity = null, compact = false } = {}) {
    this.#container = container;
    this.#compact = compact;
    this.#build(onQuantity);
    const sizes = new ResizeObserver(() => this.#schedule());
    sizes.observe(this.#parts.view);
    const hints = new MutationObserver(() => this.#followTheme());
    for (const element of [document.documentElement, document.body]) {
      if (element) hints.observe(element, { attributes: true, attributeFilter: ["class", "data-theme"] });
    }
    this.#watchers = [sizes, hints];
    this.#schedule();
  }

  get quantity() {
    return this.#quantity;
  }

  set quantity(quantity) {
    if (!QUANTITIES.includes(quantity)) throw new RangeError(`no quantity ${quantity}; there are ${QUANTITIES.join(", ")}`);
    this.#quantity = quantity;
    this.#press();
    this.#schedule();
  }

  /** Draws `run` soon, and again whenever the size changes. To be called after every step. */
  show(run) {
    if (!run) return this.clear();
    if (run !== this.#run) this.#step = this.#image = null;
    this.#run = run;
    this.#schedule();
  }

  /** Removes the run. `message` says why there is none. */
  clear(message = "no run yet") {
    this.#run = this.#plot = this.#step = this.#image = null;
    this.#message = message ?? "";
    this.#schedule();
  }

  destroy() {
    clearTimeout(this.#timer);
    this.#timer = null;
    for (const watcher of this.#watchers) watcher.disconnect();
    this.#parts.view.remove();
    this.#schedule = () => {};
  }

  #schedule = () => {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.#drawnAt = performance.now();
      this.#draw();
    }, Math.max(0, this.#drawnAt + REDRAW_MS - performance.now()));
  };

  #build(onQuantity) {
    const view = make("div", "mg-view");
    const head = make("div", "mg-head");
    const verdicts = make("span", "mg-verdicts");
    const status = make("span", "mg-status");
    const choices = make("span", "mg-choices", { role: "group", "aria-label": "What the graph shows" });
    for (const quantity of QUANTITIES) {
      const choose = () => {
        if (quantity === this.#quantity) return;
        this.quantity = quantity;
        onQuantity?.(quantity);
      };
      const button = makeButton("mg-choice", { title: AXIS_TITLES[quantity], "data-mg-quantity": quantity }, choose);
      button.textContent = BUTTONS[quantity];
      choices.append(button);
    }
    head.append(verdicts, status, choices);

    const plot = make("div", "mg-plot");
    const svg = makeSvg("svg", { class: "mg-svg", role: "img" });
    const scene = makeSvg("g", { class: "mg-scene" });
    const values = makeSvg("g", { class: "mg-values", "aria-hidden": "true" });
    svg.append(scene, values);
    const cursor = make("div", "mg-cursor", { role: "slider", tabindex: "0", "aria-label": "Step", "aria-valuemin": "0" });
    const readout = make("div", "mg-readout", { "aria-hidden": "true" });
    const empty = make("div", "mg-empty");
    readout.hidden = true;
    plot.append(svg, cursor, readout, empty);

    const legend = make("div", "mg-legend", { "aria-hidden": "true" });
    const words = make("div", "mg-words");
    const note = make("div", "mg-note");
    const live = make("div", "mg-live", { "aria-live": "polite" });
    view.append(head, plot, legend, words, note, live);
    this.#container.append(view);
    this.#parts = { view, verdicts, status, choices, plot, svg, scene, values, cursor, readout, empty, legend, words, note, live };
    this.#press();

    const follow = (event) => this.#point(this.#stepAt(event));
    cursor.addEventListener("pointermove", follow);
    cursor.addEventListener("pointerdown", follow);
    cursor.addEventListener("pointerleave", () => document.activeElement !== cursor && this.#point(null));
    cursor.addEventListener("focus", () => this.#point(this.#step ?? Math.max(0, stepsTaken(this.#run ?? { items: [] }) - 1)));
    cursor.addEventListener("blur", () => this.#point(null));
    cursor.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const last = (this.#plot?.steps ?? 0) - 1;
    if (last < 0 || hasModifier(event)) return;
    const at = this.#step ?? last;
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last };
    if (event.key in moves) this.#point(Math.min(Math.max(moves[event.key], 0), last));
    else if (event.key === "Escape" && this.#step !== null) this.#point(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** The step under the pointer, in a page that the host may have scaled. */
  #stepAt(event) {
    const plot = this.#plot;
    if (!plot?.steps) return null;
    const box = this.#parts.cursor.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.#parts.cursor.clientWidth;
    const step = Math.round(((x - plot.left) / (plot.right - plot.left)) * (plot.steps - 1));
    return Math.min(Math.max(step, 0), plot.steps - 1);
  }

  #point(step) {
    if (step === this.#step) return;
    this.#step = step;
    this.#drawCursor();
  }

  /** The run as it is drawn. */
  get #shown() {
    return this.#run && this.#image !== null ? alone(this.#run, this.#image) : this.#run;
  }

  #press() {
    for (const button of this.#parts.choices.children) {
      button.setAttribute("aria-pressed", String(button.dataset.mgQuantity === this.#quantity));
    }
  }

  #followTheme() {
    const hint = themeHint(this.#container);
    if (hint) this.#parts.view.dataset.mgTheme = hint;
    else delete this.#parts.view.dataset.mgTheme;
  }

  #draw() {
    const { view, plot, svg, scene, empty, legend, words, note, status } = this.#parts;
    addStyle(view.getRootNode());
    this.#followTheme();
    const narrow = this.#compact || view.clientWidth < 400;
    view.classList.toggle("mg-narrow", narrow);
    view.classList.toggle("mg-low", view.clientHeight < 190);
    const run = this.#run;
    this.#drawVerdicts(run, narrow);
    const shown = this.#shown;
    const taken = run ? stepsTaken(run) : 0;
    const progress = taken ? `step ${taken}${run.planned ? ` of ${run.planned}` : ""}` : "starting";
    status.textContent = !run || run.finished || (narrow && taken) ? "" : progress;
    legend.replaceChildren(...(run ? legendOf(shown, this.#quantity, narrow) : []).map(([role, words]) => {
      const entry = make("span");
      entry.append(...(SWATCHES[role] ? [makeSwatch(SWATCHES[role])] : []), words);
      return entry;
    }));
    legend.hidden = !legend.childElementCount;
    const apart = run?.items.length > 1 && narrow; // several images have no room for it
    words.textContent = words.title = run && !apart ? wordsLine(shown) : "";
    words.hidden = !words.textContent;
    note.textContent = note.title = (run && noteOf(run)) ?? "";
    note.hidden = !note.textContent;

    const { clientWidth: width, clientHeight: height } = plot;
    if (!width || !height) return; // hidden: the ResizeObserver calls again when it is shown
    this.#plot = run ? layout(shown, { width, height, quantity: this.#quantity, compact: narrow }) : null;
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    scene.replaceChildren(...(this.#plot?.shapes ?? []).map(([tag, attributes, text]) => makeSvg(tag, attributes, text)));
    empty.textContent = run ? (this.#plot.empty ?? "") : this.#message;
    empty.hidden = !empty.textContent;
    svg.setAttribute("aria-label", `Stability graph: ${AXIS_TITLES[this.#quantity]}. ${run ? summarize(run) : this.#message}`);
    this.#tell(run);
    this.#drawCursor();
  }

  /** Screen readers are told of the start, the end and every image that triggers, not of every step. */
  #tell(run) {
    const triggered = run?.items.flatMap((item, i) => (TRIGGERED.includes(item.verdict) ? [`${i} ${item.verdict}`] : []));
    const news = run ? `${run.finished} ${triggered.join()}` : null;
    if (this.#told?.run === run && this.#told.news === news) return;
    this.#told = { run, news };
    this.#parts.live.textContent = run ? summarize(run) : "";
  }

  /** An entry each image. Those of a batch are buttons: a click shows their image alone, another one all of them. */
  #drawVerdicts(run, narrow) {
    const items = run?.items ?? [];
    const many = items.length > 1;
    const { verdicts } = this.#parts;
    // Kept while the run grows: a button that is replaced under the pointer is never clicked.
    if (verdicts.childElementCount !== items.length) {
      verdicts.replaceChildren(...items.map((_, image) => this.#makeVerdict(many ? image : null)));
    }
    items.forEach(({ verdict, pValue, score }, image) => {
      const entry = verdicts.children[image];
      const [badge, rare] = [...entry.children].slice(-2);
      badge.className = `mg-badge mg-badge-${BADGES[verdict]}`;
      badge.textContent = many ? `${run.first + image} ${verdict}` : verdict;
      rare.textContent = "";
      if (pValue !== null && narrow && many && this.#quantity === "evidence") rare.textContent = ""; // the graph says it
      else if (pValue !== null && narrow) {
        rare.textContent = rarity(pValue, run.pValueFloor).replace(/,000,000$/, "M").replace(/,000$/, "k");
      } else if (pValue !== null) rare.textContent = rarity(pValue, run.pValueFloor);
      else if (score !== null) rare.textContent = (narrow || many ? "" : "S_mem ") + scoreText(score);
      entry.title = many ? summarizeImage(run, image) : summarize(run);
      if (many) entry.setAttribute("aria-pressed", String(image === this.#image));
    });
  }

  #makeVerdict(image) {
    const choose = () => {
      this.#image = this.#image === image ? null : image;
      this.#schedule();
    };
    const entry = image === null ? make("span", "mg-verdict") : makeButton("mg-verdict mg-image", {}, choose);
    if (image !== null) entry.append(makeSwatch(runSwatch(image)));
    entry.append(make("span", "mg-badge"), make("span"));
    return entry;
  }

  #drawCursor() {
    const { view, values, cursor, readout, plot: frame } = this.#parts;
    const plot = this.#plot;
    const last = Math.max((plot?.steps ?? 0) - 1, 0);
    const step = plot?.steps && this.#step !== null ? Math.min(this.#step, last) : null;
    cursor.setAttribute("aria-valuemax", last);
    cursor.setAttribute("aria-valuenow", step ?? Math.max(0, (plot?.taken ?? 0) - 1));
    readout.hidden = step === null;
    if (step === null) {
      values.replaceChildren();
      cursor.setAttribute("aria-valuetext", "no step chosen");
      return;
    }
    const at = valuesAt(this.#shown, step, this.#quantity);
    const x = Math.round(plot.x(step)) + 0.5;
    const dots = at.items.flatMap((_, i) => {
      const look = { class: "mg-value", r: 3.5, style: styleOf(i).style };
      const y = plot.at(i, step);
      return Number.isFinite(y) ? [makeSvg("circle", { ...look, cx: x, cy: round(y) })] : [];
    });
    values.replaceChildren(
      makeSvg("polyline", { class: "mg-rule", points: `${x},${plot.top} ${x},${plot.bottom}` }),
      ...dots,
    );
    this.#fillReadout(at, Math.max(1, Math.floor((view.clientHeight - 16) / 14) - 1));
    cursor.setAttribute("aria-valuetext", wordsOf(at, this.#image));
    const room = x + 12 + readout.offsetWidth <= frame.clientWidth;
    readout.style.left = `${room ? x + 12 : Math.max(0, x - 12 - readout.offsetWidth)}px`;
    readout.style.top = `${Math.max(2 - frame.offsetTop, Math.min(plot.top + 2, frame.clientHeight - readout.offsetHeight))}px`;
  }

  #fillReadout(at, room) {
    const { readout } = this.#parts;
    const cell = (kind, text) => {
      const element = make("span", kind);
      element.append(text);
      return element;
    };
    // A batch with more rows than fit gets further columns, and fewer words.
    const groups = Math.ceil((at.items.length + Number.isFinite(at.low)) / room);
    const rows = at.items.flatMap((item, i) => {
      if (this.#image !== null && this.#image !== i) return [];
      const name = cell("mg-readout-name", at.items.length > 1 ? String(at.first + i) : "this run");
      name.prepend(makeSwatch(runSwatch(i)));
      const notes = [];
      if (Number.isFinite(item.score)) notes.push(`${scoreText(item.score)} sd`);
      if (item.corrected && groups === 1) notes.push("corrected");
      return [[name, cell("mg-readout-value", item.words), cell("mg-readout-note", notes.join(", "))]];
    });
    if (Number.isFinite(at.low)) {
      const range = cell("mg-readout-value mg-reference-text", `${short(at.low)} to ${short(at.high)}`);
      rows.push([cell("mg-readout-name mg-reference-text", "ordinary"), range, cell("mg-readout-note", "")]);
    }
    const sigma = Number.isFinite(at.sigma) ? `, sigma ${short(at.sigma)}` : "";
    readout.style.gridTemplateColumns = `repeat(${3 * groups},max-content)`;
    const each = Math.ceil(rows.length / groups);
    const cells = Array.from({ length: each }, (_, i) => Array.from({ length: groups }, (_, g) => rows[g * each + i] ?? []));
    readout.replaceChildren(cell("mg-readout-head", `step ${at.step}${sigma}`), ...cells.flat(2));
  }
}

function wordsOf(at, image) {
  const items = at.items.flatMap((item, i) => {
    if (image !== null && image !== i) return [];
    const parts = [item.words === "-" ? "no value" : item.words];
    if (Number.isFinite(item.score)) parts.push(`${scoreText(item.score)} standard deviations off`);
    if (item.corrected) parts.push("corrected");
    return [`image ${at.first + i}: ${parts.join(", ")}`];
  });
  if (Number.isFinite(at.low)) items.push(`ordinary runs: ${short(at.low)} to ${short(at.high)}`);
  return [`step ${at.step}`, ...items].join("; ");
}

const hasModifier = (event) => event.ctrlKey || event.metaKey || event.altKey;

/** "dark" or "light" where an element around the graph says so, as hosts do; null where the reader's preference decides. */
function themeHint(element) {
  for (let at = element; at; at = at.parentElement ?? at.getRootNode().host) {
    const said = at.dataset?.theme ?? "";
    for (const theme of ["dark", "light"]) {
      if (said.toLowerCase().includes(theme) || [theme, `${theme}-theme`].some((name) => at.classList.contains(name))) return theme;
    }
  }
  return null;
}

function addStyle(root) {
  const home = root instanceof ShadowRoot ? root : document;
  if (home.getElementById("mg-graph-style")) return;
  const style = make("style", "", { id: "mg-graph-style" });
  style.textContent = STYLE;
  (home.head ?? home).append(style);
}

function make(tag, kind, attributes = {}) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function makeButton(kind, attributes, onClick) {
  const button = make("button", kind, { type: "button", ...attributes });
  button.addEventListener("click", onClick);
  // ComfyUI drags a node by the pointer and has shortcuts on Space and Enter.
  button.addEventListener("pointerdown", (event) => event.stopPropagation());
  for (const name of ["keydown", "keyup"]) {
    button.addEventListener(name, (event) => {
      if ((event.key === "Enter" || event.key === " ") && !hasModifier(event)) event.stopPropagation();
    });
  }
  return button;
}

function makeSvg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const runSwatch = (index) => ["polyline", { class: "mg-run", points: "1,4 17,4", ...styleOf(index) }];
const SWATCHES = {
  run: runSwatch(0),
  trigger: ["polyline", { class: "mg-trigger", points: "9,0 9,8" }],
  broken: ["polyline", { class: "mg-broken", points: "9,0 9,8" }],
  corrected: ["circle", { class: "mg-key-corrected", cx: 9, cy: 4, r: 2.6 }],
  band: ["rect", { class: "mg-key-band", width: 18, height: 8 }],
  first: ["circle", { class: "mg-key-look", cx: 9, cy: 4, r: 3.4 }],
  asked: ["polygon", { class: "mg-key-look", points: "5,4 9,0 13,4 9,8" }],
};

function makeSwatch([tag, attributes]) {
  const svg = makeSvg("svg", { class: "mg-swatch", width: 18, height: 8, "aria-hidden": "true" });
  svg.append(makeSvg(tag, attributes));
  return svg;
}
