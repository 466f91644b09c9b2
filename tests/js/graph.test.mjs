// What a run holds, what is said of it, and where it is drawn. Needs no browser.

import assert from "node:assert/strict";
import test from "node:test";

import {
  QUANTITIES, addStep, finishRun, layout, legendOf, rangeOf, rarity, runOf, startRun, summarize, valuesAt,
} from "../../js/graph.js";

const STEPS = 10;
const fill = (value) => Array(STEPS).fill(value);
const band = (mean, std) => ({ mean: fill(mean), std: fill(std) });

function outline(changes = {}) {
  return {
    steps: STEPS,
    bands: { latent: band(30, 1), update: band(2, 0.1), denoised: band(20, 1) },
    thresholds: { method: "reference", false_positive_rate: 0.005, gamma: 3 },
    mode: "mitigate",
    note: null,
    reference_count: 50,
    ...changes,
  };
}

function event(step, changes = {}) {
  return {
    step,
    sigma: STEPS - step,
    latent_norm: [31, 30],
    update_norm: [2.1, 2],
    denoised_norm: [20, 20],
    guidance_norm: [null, null],
    update_score: [1, 0],
    denoised_score: [0, 0],
    state: ["stable", "stable"],
    p_value: null,
    judged_by: [null, null],
    mitigated: [false, false],
    bands: ["latent", "update", "denoised"],
    ...changes,
  };
}

function trace(changes = {}) {
  return {
    format: "memorization-guard.trace",
    version: 4,
    verdict: "likely copy",
    score: 25.33747,
    trigger_step: 3,
    nonfinite_step: null,
    note: null,
    mode: "mitigate",
    thresholds: { method: "reference", false_positive_rate: 0.005, gamma: 3 },
    steps: {
      sigma: fill(1),
      latent_norm: fill(30),
      update_norm: [4, 4, 4, 2, 2, 2, 2, 4, 4, 4],
      denoised_norm: fill(20),
      update_score: fill(20),
      denoised_score: fill(4),
      mitigated: [false, false, false, true, true, true, true, false, false, false],
    },
    bands: outline().bands,
    reference_count: 50,
    ...changes,
  };
}

const size = { width: 640, height: 260, quantity: "update" };
const shapes = (plot, role) => plot.shapes.filter(([, attributes]) => attributes.class.split(" ").includes(`mg-${role}`));
const points = ([, attributes]) => attributes.points.split(" ").map((pair) => pair.split(",").map(Number));
const words = (plot) => plot.shapes.filter(([tag]) => tag === "text").map(([, , text]) => text);

test("a run is said in words", () => {
  assert.equal(summarize(runOf([trace()])), "Image 1: likely copy, triggered at step 3, S_mem 25.3, 4 steps corrected.");
  const two = runOf([trace({ verdict: "stable", trigger_step: null, score: 0.74, steps: {} }), trace({ nonfinite_step: 8 })]);
  assert.match(summarize(two), /^Image 1: stable, S_mem 0\.7\.\nImage 2: likely copy, .* not a number from step 8\.$/);
});

test("an unscored run says why", () => {
  const bare = trace({ verdict: "unscored", score: null, trigger_step: null, bands: {}, steps: { update_norm: fill(2) } });
  assert.equal(summarize(runOf([bare])), "Image 1: unscored.\nno profile: not scored.");
  assert.match(summarize(runOf([{ ...bare, note: "The sampler keeps to no fixed schedule." }])), /fixed schedule\.$/);
});

test("a live run says how far it is, and takes its verdict, trigger and score from its steps", () => {
  const run = startRun(outline());
  assert.equal(summarize(run), "Sampling, 10 steps planned.");
  addStep(run, event(0));
  assert.match(summarize(run), /^Sampling, step 1 of 10\.\nImage 1: stable so far, S_mem 1\.0\./);
  addStep(run, event(1, { state: ["stable", "mild"], update_score: [1, 5] }));
  addStep(run, event(2, { state: ["stable", "strong"], update_score: [1, 4], mitigated: [false, true] }));
  assert.match(summarize(run), /Image 2: strong, triggered at step 1, S_mem 5\.0, 1 step corrected\.$/);
  finishRun(run, [trace()]);
  assert.match(summarize(run), /^Image 1: likely copy/);
  addStep(run, event(9));
  assert.equal(run.items.length, 1, "a step that comes after the end changes nothing");
});

test("how rare a run is, is said in round numbers, as Python says it", () => {
  const said = [[0.9, "most"], [0.5, "most"], [0.3, "1 in 3"], [0.1, "1 in 10"], [0.0123, "1 in 81"], [0.00123, "1 in 810"],
    [0.00005, "1 in 20,000"], [0.00004444, "1 in 23,000"], [1e-6, "1 in 1,000,000"]];
  for (const [share, words] of said) assert.equal(rarity(share), words, String(share));
  assert.equal(rarity(0.000125, 0.000125), "rarer than 1 in 8,000");
  assert.equal(rarity(0.0001251, 0.000125), "1 in 8,000");
});

test("the words that call a copy up are named, as text", () => {
  const words = { words: ["<b>wosol</b>", "dethax"], p_values: [0.1, 0.2], text: "a ring, by", p_value: 0.6 };
  assert.match(summarize(runOf([trace({ words })])), /, called up by "<b>wosol<\/b>", "dethax", (?!left out)/);
  assert.match(summarize(runOf([trace({ words: { ...words, left_out: true } })])), /"dethax", left out, /);
});

test("what the references carry no further is told as rarer than that", () => {
  const words = (p_value) => summarize(runOf([trace({ score: null, p_value, p_value_floor: 0.000125 })]));
  assert.match(words(0.000125), /triggered at step 3, rarer than 1 in 8,000 ordinary images,/);
  assert.match(words(0.01), /as far as 1 in 100 ordinary images/);
});

test("the p-value of a trace is said, and that of events is the last that was told", () => {
  const rare = { score: null, p_value: 0.00005 };
  assert.equal(
    summarize(runOf([trace(rare)])),
    "Image 1: likely copy, triggered at step 3, as far as 1 in 20,000 ordinary images, 4 steps corrected.",
  );
  const usual = trace({ verdict: "stable", trigger_step: null, score: 0.7, p_value: 0.8, steps: {} });
  assert.match(summarize(runOf([usual])), /^Image 1: stable, S_mem 0\.7, as far as most ordinary images\.$/m);
  for (const odd of [undefined, null, "x", NaN]) assert.equal(runOf([trace({ p_value: odd })]).items[0].pValue, null);

  const run = startRun(outline());
  addStep(run, event(0));
  assert.deepEqual(run.items.map((item) => item.pValue), [null, null], "of a run without reference runs there is none");
  addStep(run, event(1, { p_value: [0.25, null] }));
  addStep(run, event(2, { p_value: [0.001, 0.6] }));
  addStep(run, event(3, { p_value: [null, 0.6] }));
  assert.deepEqual(run.items.map((item) => item.pValue), [0.001, 0.6]);
  assert.match(summarize(run), /Image 1: .*, as far as 1 in 1,000 ordinary images\.\nImage 2: .*, as far as most ordinary images\./);
});

test("every verdict has its badge, and a word that is none is unscored", () => {
  for (const verdict of ["stable", "likely copy", "mild", "strong", "unscored"]) assert.equal(runOf([trace({ verdict })]).items[0].verdict, verdict);
  for (const verdict of [null, "toString", "", 3]) assert.equal(runOf([trace({ verdict })]).items[0].verdict, "unscored");
});

test("whatever is sent, nothing throws", () => {
  const odd = [null, undefined, 3, "x", {}, { step: -1 }, { step: 1e12 }, { step: NaN }, { step: "2" }, { step: 0 }];
  const values = [null, NaN, Infinity, -1, "7", [], {}, [null], [NaN, "x", -3], [Infinity], [1e308]];
  for (const value of values) {
    odd.push(Object.fromEntries(["step", ...Object.keys(event(0)).slice(1)].map((key) => [key, key === "step" ? 2 : value])));
    odd.push(event(4, { latent_norm: value, state: value, mitigated: value }));
  }
  for (const start of [null, undefined, {}, outline(), { bands: { update: { mean: "x", std: [] } }, thresholds: 5, steps: -3 }]) {
    const run = startRun(start);
    for (const item of odd) {
      addStep(run, item);
      for (const quantity of QUANTITIES) layout(run, { ...size, quantity });
      assert.equal(typeof summarize(run), "string");
      valuesAt(run, 2, "latent");
    }
  }
  for (const traces of [null, [], [null], [{}], [{ steps: 3, bands: 4 }], [{ steps: { update_norm: [null, "x"] } }]]) {
    for (const run of [runOf(traces), finishRun(startRun(outline()), traces)]) {
      layout(run, size);
      assert.equal(typeof summarize(run), "string");
    }
  }
});

test("a norm that is not a number is marked, a missing step is not", () => {
  const run = startRun(outline());
  for (const step of [0, 2]) addStep(run, event(step));
  assert.equal(run.items[0].nonfinite, null);
  addStep(run, event(3, { update_norm: [null, 2] }));
  assert.deepEqual(run.items.map((item) => item.nonfinite), [3, null]);
  assert.deepEqual(shapes(layout(run, size), "label-broken").map(([, , text]) => text), ["1"]);
});

test("the run and the band are drawn to one scale, and the trigger and the corrected steps are marked", () => {
  const run = runOf([trace()]);
  const plot = layout(run, size);
  const curve = points(shapes(plot, "run")[0]);
  assert.equal(curve.length, STEPS);
  assert.ok(Math.abs(curve[0][1] - plot.y(4)) < 0.1);
  assert.ok(Math.abs(curve[5][1] - plot.y(2)) < 0.1);
  const corrected = shapes(plot, "corrected").map(([, { cx, cy }]) => [cx, cy]);
  assert.deepEqual(corrected, curve.slice(3, 7));
  const edge = points(shapes(plot, "band")[0]).map(([, y]) => y);
  const spread = Math.sqrt(Math.log(1 + 0.05 ** 2)); // of the logarithm, where mean and sd are 2 and 0.1
  const [low, high] = [-3, 3].map((sd) => 2 * Math.exp(sd * spread - spread ** 2 / 2));
  assert.ok(Math.abs(Math.max(...edge) - plot.y(low)) < 0.2 && Math.abs(Math.min(...edge) - plot.y(high)) < 0.2);
  assert.ok(Math.abs(points(shapes(plot, "trigger")[0])[0][0] - plot.x(3)) < 1);
  assert.ok(words(plot).includes("trigger at step 3"));
  assert.ok(words(plot).includes("update norm"));
});

test("the legend says what is drawn, and no more", () => {
  const said = (run, compact = false) => legendOf(run, "update", compact).map(([, text]) => text);
  assert.deepEqual(said(runOf([trace()])), ["this run", "corrected", "50 ordinary runs, ± 3 sd"]);
  assert.deepEqual(said(runOf([trace()]), true), ["corrected", "ordinary"]);
  const bare = { bands: {}, reference_count: null };
  assert.deepEqual(said(runOf([trace(bare), trace({ ...bare, nonfinite_step: 8 })])), ["trigger", "not a number", "corrected"]);
  assert.deepEqual(said(startRun(outline())), []);
});

test("every size and quantity stays inside the drawing, and no two labels overlap", () => {
  const rare = (p_value, changes) => trace({ p_value, p_value_floor: 0.000125, judged_by: "asked", trigger_step: 0, ...changes });
  const batch = [rare(0.000125), rare(0.004, { trigger_step: 4, verdict: "strong" }), rare(0.8, { nonfinite_step: 9, judged_by: "first" })];
  const levels = [...Array(16).keys()].map((i) => rare(Math.max(0.000125, 0.9 / 2 ** i)));
  for (const [width, height] of [[250, 110], [290, 150], [640, 260], [900, 220]]) {
    for (const traces of [[rare(0.005)], [rare(0.0055)], batch, levels, Array(16).fill(rare(0.000125))]) {
      for (const quantity of QUANTITIES) {
        const plot = layout(runOf(traces), { width, height, quantity, compact: width < 400 });
        assert.equal(plot.empty, undefined);
        const boxes = [];
        for (const [tag, a, text] of plot.shapes) {
          const all = tag === "text" ? [[a.x, a.y]] : tag === "circle" ? [[a.cx, a.cy]] : points([tag, a]);
          for (const [x, y] of all) assert.ok(x >= 0 && x <= width && y >= 0 && y <= height, `${tag} ${a.class} ${x} ${y}`);
          if (tag !== "text") continue;
          const wide = 6 * text.length;
          const x = a["text-anchor"] === "end" ? a.x - wide : a["text-anchor"] === "middle" ? a.x - wide / 2 : a.x;
          assert.ok(x + wide <= width + 8, text);
          boxes.push({ text, x, y: a.y, wide });
        }
        for (const [i, a] of boxes.entries()) {
          for (const b of boxes.slice(i + 1)) {
            const apart = a.x + a.wide <= b.x || b.x + b.wide <= a.x || Math.abs(a.y - b.y) >= 10;
            assert.ok(apart, `"${a.text}" and "${b.text}" overlap at ${width} x ${height}, ${quantity}`);
          }
        }
      }
    }
  }
});

test("the band and the planned axis are there from the first step on, and the axis keeps still inside the band", () => {
  const run = startRun(outline());
  assert.equal(layout(run, size).empty, "waiting for the first step");
  addStep(run, event(0));
  const before = layout(run, size);
  assert.equal(before.steps, STEPS);
  assert.equal(shapes(before, "band").length, 1);
  for (let step = 0; step < STEPS; step++) {
    addStep(run, event(step));
    const plot = layout(run, size);
    assert.equal(points(shapes(plot, "run")[0] ?? ["", { points: "0,0" }]).length, step + 1);
    assert.equal(plot.y(2), before.y(2));
  }
});

test("a band is drawn where it holds, and said to be missing where it does not", () => {
  const run = startRun(outline());
  addStep(run, event(0, { bands: ["denoised"] }));
  assert.equal(shapes(layout(run, size), "band").length, 0);
  assert.deepEqual(legendOf(run, "update", false).map(([, text]) => text), ["no band holds for this run"]);
  assert.ok(Number.isNaN(valuesAt(run, 0, "update").low));
  assert.equal(shapes(layout(run, { ...size, quantity: "denoised" }), "band").length, 1);
});

test("a band's tail has no part in the axis, and its lower edge is above zero", () => {
  const wide = { mean: fill(2), std: fill(4) };
  const run = runOf([trace({ bands: { update: wide } })]);
  const { low, high } = valuesAt(run, 4, "update");
  assert.ok(low > 0 && high > 20);
  assert.ok(layout(run, size).y(4) < size.height / 2, "the run fills the picture");
});

const evidence = { ...size, quantity: "evidence" };
const rare = (p_value, changes = {}) => trace({ p_value, p_value_floor: 0.000125, judged_by: "asked", trigger_step: 0, ...changes });

test("the evidence is how rare the prompt is, as a level with its mark, over threshold and ordinary prompts", () => {
  const plot = layout(runOf([rare(0.001, { verdict: "corrected" })]), evidence);
  const y = (count) => shapes(plot, "grid").map((each) => points(each)[0][1])[Math.log10(count) - 1];
  const [[x0, level], [x1, end]] = points(shapes(plot, "run")[0]);
  assert.ok(Math.abs(level - y(1000)) < 1 && level === end && x0 < x1);
  const [mark] = shapes(plot, "mark-outlined");
  assert.equal(mark[0], "polygon", "a diamond: the network was asked");
  assert.ok(points(mark).every(([x]) => x < plot.x(0)), "judged before the first step");
  const threshold = points(shapes(plot, "threshold")[0])[0][1];
  assert.ok(threshold > y(1000) && threshold < y(100));
  assert.ok(words(plot).includes("triggers from 1 in 200 on"));
  assert.ok(words(plot).includes("9 of 10 ordinary prompts"));
  assert.ok(Math.abs(Math.min(...points(shapes(plot, "band")[0]).map(([, at]) => at)) - y(10)) < 1);
  assert.deepEqual(shapes(plot, "corrected").map(([, { cx }]) => cx), [3, 4, 5, 6].map((i) => Math.round(plot.x(i) * 10) / 10));
});

test("what the references tell no further lies beyond the axis", () => {
  const at = (p_value) => points(shapes(layout(runOf([rare(p_value)]), evidence), "run")[0])[0][1];
  const limit = points(shapes(layout(runOf([rare(0.5)]), evidence), "axis")[0])[0][1];
  assert.ok(at(0.000125) < limit - 4 && at(0.00013) >= limit - 1);
});

test("every image has its mark, by verdict and by look, and images of one level share a line and a label", () => {
  const stable = rare(0.6, { verdict: "stable", judged_by: "first", trigger_step: null });
  const plot = layout(runOf([rare(0.000125), rare(0.000125), rare(0.000125), stable]), evidence);
  assert.equal(shapes(plot, "mark-solid").length, 3);
  assert.deepEqual(shapes(plot, "mark-plain").map(([tag]) => tag), ["circle"]);
  assert.equal(new Set(shapes(plot, "mark-solid").map(([, { points: at }]) => at)).size, 3, "side by side");
  assert.equal(shapes(plot, "run").length, 2);
  assert.deepEqual(shapes(plot, "item").map(([, , text]) => text), ["1-3", "4"]);
  const said = legendOf(runOf([rare(0.001), stable]), "evidence", false).map(([, text]) => text);
  assert.deepEqual(said, ["judged at the first evaluation", "judged by what the network was asked", "corrected"]);
});

test("evidence is live: the scale is there before the first step, the mark with it, and the line grows", () => {
  const run = startRun(outline({ p_value_floor: 0.000125 }));
  assert.equal(shapes(layout(run, evidence), "threshold").length, 1);
  assert.equal(shapes(layout(run, evidence), "run").length, 0);
  const ends = [];
  for (const step of [0, 1, 2]) {
    addStep(run, event(step, { p_value: [0.6, 0.001], judged_by: ["first", "asked"], state: ["stable", "likely copy"] }));
    const plot = layout(run, evidence);
    ends.push(points(shapes(plot, "run")[0])[1][0]);
    assert.equal(shapes(plot, "mark-solid").length + shapes(plot, "mark-plain").length, 2);
  }
  assert.ok(ends[0] < ends[1] && ends[1] < ends[2]);
});

test("where nothing is judged, the evidence says so", () => {
  const bare = trace({ verdict: "unscored", p_value: null, trigger_step: null });
  assert.match(layout(runOf([bare]), evidence).empty, /^not judged/);
  const run = startRun({ steps: STEPS });
  assert.equal(layout(run, evidence).empty, "waiting for the first step");
  addStep(run, event(0, { state: [] }));
  assert.match(layout(run, evidence).empty, /^not judged/);
});

test("the published method's evidence is its score at every step, with its thresholds", () => {
  const thresholds = { method: "published", tau_mild: 3, tau_strong: 14, gamma: 3 };
  const plot = layout(runOf([trace({ thresholds })]), evidence);
  assert.equal(points(shapes(plot, "run")[0]).length, STEPS);
  assert.ok(Math.abs(points(shapes(plot, "run")[0])[0][1] - plot.y(4)) < 0.1, "the smaller of the two scores");
  assert.ok(words(plot).includes("triggers above 3 sd") && !words(plot).includes("strong above 14 sd"));
  assert.equal(valuesAt(runOf([trace({ thresholds })]), 4, "evidence").items[0].words, "4");
});

test("a run that leaves the band widens the axis in few, round steps", () => {
  const highs = new Set();
  for (let value = 2; value < 20; value += 0.1) highs.add(rangeOf([value], [1.7, 2.3]).high);
  assert.ok(highs.size <= 9, [...highs].join());
});

test("a log scale where the norms stretch over more than a decade", () => {
  const falling = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((i) => 100 / 2 ** i);
  const range = rangeOf(falling, falling.flatMap((v) => [v * 0.9, v * 1.1]));
  assert.equal(range.log, true);
  assert.equal(rangeOf([2, 3, 4], []).log, false);
  assert.equal(rangeOf([1e9, 2], [1.7, 2.3]).high < 60, true, "a latent that exploded must not hide the band");
});

test("a batch is told apart by colour, dash and number", () => {
  const plot = layout(runOf(Array(5).fill(trace())), size);
  const looks = shapes(plot, "run").map(([, a]) => `${a.style} ${a["stroke-dasharray"]}`);
  assert.equal(new Set(looks).size, 5);
  assert.deepEqual(shapes(plot, "item").map(([, , text]) => text).sort(), ["1", "2", "3", "4", "5"]);
  assert.ok(words(plot).includes("1, 2, 3, 4, 5"));
});

test("a batch whose first image has another number is numbered from there, and a chosen image stands before the others", () => {
  const run = finishRun(startRun(outline({ first: 5 })), [trace(), trace()]);
  assert.deepEqual(shapes(layout(run, size), "item").map(([, , text]) => text).sort(), ["5", "6"]);
  assert.ok(words(layout(run, size)).includes("5, 6"));
  assert.ok(summarize(run).startsWith("Image 5: "));
  const faint = () => shapes(layout(run, size), "run").map(([, a]) => a.opacity);
  assert.deepEqual(faint(), [undefined, undefined]);
  run.chosen = 1;
  assert.deepEqual(faint(), [0.3, undefined]);
});

test("the values at a step are those of the drawing", () => {
  const at = valuesAt(runOf([trace()]), 4, "update");
  assert.ok(Math.abs(Math.sqrt(at.low * at.high) - 2 / Math.sqrt(1 + 0.05 ** 2)) < 1e-9, "its middle is the mean of the logarithm");
  assert.deepEqual(at.items, [{ value: 2, words: "2", corrected: true, score: 20 }]);
  assert.equal(valuesAt(runOf([rare(0.001)]), 4, "evidence").items[0].words, "1 in 1,000");
});
