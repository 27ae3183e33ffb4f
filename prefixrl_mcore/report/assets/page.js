// Which charts the page has, from the numbers in #data.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs.map((run, index) => ({ ...run, index, ink: `var(--run-${index})` }));
const STATE = { hidden: new Set(), smoothing: 0.6, axis: "step" };
const DOTTED = "1.5 4.5";
const PHASES = ["sync", "rollout", "verify", "pack", "forward_backward", "optimizer", "save", "eval", "other"];
const CHARTS = [];

const visible = () => RUNS.filter((run) => !STATE.hidden.has(run.index));
const setTitle = (name) => (name === "train" ? "training problems" : name === "heldout" ? "held-out problems" : `held-out: ${name}`);
const zip = (xs, ...columns) => xs.map((x, i) => [x, ...columns.map((column) => (column ? column[i] : null))]);

const AXES = {
  step: { xTitle: "step", xName: "step", xFormat: (value) => String(value), x: {} },
  flops: { xTitle: "total FLOPs", xName: "around", xFormat: (value) => `${formatNumber(value)} FLOPs`, x: { min: 0, shared: true, pad: 0.02 } },
};

// Adds a card whose plot is drawn by draw(plot), again after each change of what is shown.
function addCard(parent, title, subtitle, draw, key) {
  const plot = el("div", { class: "plot" });
  const head = el("div", { class: "chart-head" }, el("h3", { text: title }), key);
  parent.append(el("section", { class: "card", "aria-label": title }, head, el("p", { class: "chart-sub", text: subtitle }), plot));
  CHARTS.push(() => draw(plot));
}

function redraw() {
  for (const draw of CHARTS) draw();
}

function styleKey(entries) {
  const lines = entries.map(([text, dash]) => {
    const line = svg("line", { x1: 0, x2: 24, y1: 5, y2: 5, stroke: "var(--ink-2)", "stroke-width": 2, "stroke-dasharray": dash || null });
    return el("span", {}, svg("svg", { width: 24, height: 10, "aria-hidden": "true" }, line), text);
  });
  return el("div", { class: "key" }, ...lines);
}

function runKey() {
  if (RUNS.length < 2) return null;
  return el("div", { class: "key" }, ...RUNS.map((run) => {
    const line = svg("line", { x1: 0, x2: 24, y1: 5, y2: 5, stroke: run.ink, "stroke-width": 2, "stroke-dasharray": run.dash || null });
    const mark = assign(MARKS[run.marker](12, 5, 3.2), { fill: run.ink });
    return el("span", {}, svg("svg", { width: 24, height: 10, "aria-hidden": "true" }, line, mark), run.title);
  }));
}

function buildToggles() {
  const holder = document.getElementById("toggles");
  for (const run of RUNS) {
    const swatch = svg("svg", { width: 26, height: 12, "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: run.ink, "stroke-width": 2.2, "stroke-dasharray": run.dash || null }),
      assign(MARKS[run.marker](13, 6, 4), { fill: run.ink }));
    const button = el("button", { class: "toggle", type: "button", "aria-pressed": "true", title: "Show or hide in all charts" }, swatch, run.title);
    button.addEventListener("click", () => {
      const hide = !STATE.hidden.has(run.index);
      if (hide && STATE.hidden.size === RUNS.length - 1) return;
      STATE.hidden[hide ? "add" : "delete"](run.index);
      button.setAttribute("aria-pressed", String(!hide));
      redraw();
    });
    holder.append(button);
  }
}

// The highest accuracy of any set, so that training and held-out problems share one scale.
function accuracyCeiling() {
  let high = 0.05;
  for (const run of RUNS) {
    for (const name of DATA.sets) {
      const values = run.evals[`eval/${name}/accuracy`] || [];
      const errors = run.evals[`eval/${name}/accuracy_stderr`] || [];
      values.forEach((value, i) => {
        if (isNumber(value)) high = Math.max(high, value + 1.96 * (errors[i] || 0));
      });
    }
  }
  return Math.min(1, high * 1.03);
}

function accuracySeries(name, axis) {
  return visible().map((run) => {
    const values = run.evals[`eval/${name}/accuracy`] || [];
    const errors = run.evals[`eval/${name}/accuracy_stderr`] || [];
    const points = values.map((value, i) => {
      const half = isNumber(value) && isNumber(errors[i]) ? 1.96 * errors[i] : null;
      const low = half === null ? null : Math.max(0, value - half);
      return [run.evals[axis][i], value, low, half === null ? null : Math.min(1, value + half)];
    });
    return { name: run.title, color: run.ink, dash: run.dash, marker: run.marker, marks: true, exact: true, points };
  });
}

function offsetsOf(runs) {
  return runs
    .map((run) => {
      const parts = [run.collect > 0 ? "collection" : null, run.sft > 0 ? "SFT" : null].filter(Boolean);
      return { end: run.collect + run.sft, color: run.ink, text: `${run.title}: ${parts.join(" + ")}` };
    })
    .filter((offset) => offset.end > 0);
}

function buildAccuracy() {
  const holder = document.getElementById("accuracy-charts");
  const top = accuracyCeiling();
  for (const axis of ["flops", "step"]) {
    for (const name of DATA.sets) {
      const title = `Accuracy without a prefix, ${setTitle(name)}`;
      const subtitle = axis === "flops"
        ? "Against total FLOPs. Shaded: off-policy compute (collection, SFT), charged before the first step."
        : "Against optimizer steps. Band: 95 % interval over problems.";
      addCard(holder, title, subtitle, (plot) => lineChart(plot, {
        ...AXES[axis], title, series: accuracySeries(name, axis), y: { min: 0, max: top }, height: 330,
        format: formatShare, offsets: axis === "flops" ? offsetsOf(visible()) : [],
        empty: "No evaluation of this set has been recorded yet.",
      }), runKey());
    }
    if (DATA.sets.length === 1) {
      const title = "Accuracy without a prefix, held-out problems";
      addCard(holder, title, "Not available.", (plot) => plot.replaceChildren(emptyNote(
        "No held-out set was evaluated: memorising cannot be told from learning.")));
    }
  }
}

function unlockSeries() {
  const series = [];
  const runs = visible().filter((run) => run.unlock.length);
  const base = runs.map((run) => ({ run, curve: run.unlock[0] })).find((one) => one.curve.step === 0);
  if (base) {
    series.push({ name: "before training", color: "var(--ink-3)", dash: "5 4", marker: "circle", marks: true, exact: true, points: base.curve.points });
  }
  for (const run of runs) {
    const curve = run.unlock[run.unlock.length - 1];
    if (curve.step === 0 && base) continue;
    series.push({ name: `${run.title}, step ${curve.step}`, color: run.ink, dash: run.dash, marker: run.marker, marks: true, exact: true, points: curve.points });
  }
  return series;
}

function passSeries(name) {
  return visible().filter((run) => run.pass.length && run.pass[0].sets[name]).map((run) => ({
    name: `${run.title}, step ${run.pass[0].step}`, color: run.ink, dash: run.dash, marker: run.marker, marks: true,
    exact: true, points: run.pass[0].sets[name],
  }));
}

function buildPrefixes() {
  const holder = document.getElementById("prefix-charts");
  addCard(holder, "Unlock curve", "Success against the share of a correct trace that is given as prefix. Band: 95 % interval.", (plot) =>
    lineChart(plot, {
      title: "Unlock curve", series: unlockSeries(), xTitle: "prefix, share of the trace", xName: "prefix", xFormat: formatShare,
      x: { min: 0, max: 1 }, y: { min: 0, max: 1 }, height: 330, format: formatShare,
      empty: "No unlock curve has been measured yet: run prefixrl eval.",
    }), styleKey([["before training", "5 4"], ["after", ""]]));
  for (const name of DATA.sets) {
    const title = `pass@k without a prefix, ${setTitle(name)}`;
    addCard(holder, title, "Unbiased estimate at the last evaluated checkpoint. Band: bootstrap interval over problems.", (plot) => {
      const series = passSeries(name);
      const ks = [...new Set(series.flatMap((one) => one.points.map((p) => p[0])))].sort((a, b) => a - b);
      lineChart(plot, {
        title, series, xTitle: "k", xName: "k =", xFormat: String, x: { log: true }, y: { min: 0, max: 1 }, height: 330,
        format: formatShare, fixedTicks: ks, empty: "No pass@k has been measured yet: run prefixrl eval.",
      });
    }, runKey());
  }
}

function buildBins() {
  const holder = document.getElementById("bin-charts");
  for (const run of RUNS) {
    addCard(holder, `Accuracy by prefix length, ${run.title}`, "Rows: share of the trace given as prefix. Columns: evaluations.", (plot) => {
      if (!run.bins) {
        plot.replaceChildren(emptyNote("No accuracy by prefix length has been recorded for this run."));
        return;
      }
      const rows = run.bins.edges.map(([low, high]) => (high === 0 ? "no prefix" : `${Math.round(100 * low)}–${Math.round(100 * high)} %`));
      heatMap(plot, { rows, columns: run.bins.steps, values: run.bins.values, label: `Heat map of accuracy by prefix length over training, ${run.title}` });
    });
  }
}

// Curves of one or two quantities of the training lines; the second is dotted.
function dynamicsSeries(keys, names) {
  const series = [];
  for (const run of visible()) {
    keys.forEach((key, i) => {
      const column = run.train[key];
      if (!column) return;
      const name = names[i] ? `${run.title}, ${names[i]}` : run.title;
      series.push({ name, color: run.ink, dash: i ? DOTTED : run.dash, marker: run.marker, points: zip(run.train[STATE.axis], column) });
    });
  }
  return series;
}

const SPLIT = ["no prefix", "prefixed"];
const DYNAMICS = [
  ["Reward", "Mean reward of training rollouts.", ["rollout/reward_no_prefix_mean", "rollout/reward_prefix_mean"], SPLIT, { min: 0 }, formatShare],
  ["All-negative groups", "Share of groups without any rewarded rollout: no gradient.", ["rollout/all_negative_no_prefix_fraction", "rollout/all_negative_prefix_fraction"], SPLIT, { min: 0, max: 1 }, formatShare],
  ["All-positive groups", "Share of groups in which every rollout was rewarded: no gradient.", ["rollout/all_positive_fraction"], [], { min: 0 }, formatShare],
  ["Gradient norm", "Global L2 norm before clipping.", ["policy/gradient_norm"], [], { min: 0 }, formatNumber],
  ["Entropy", "Mean over completion tokens, nats.", ["loss/entropy_nats"], [], { min: 0 }, formatNumber],
  ["Completion length", "Mean tokens per completion.", ["rollout/completion_tokens_mean"], [], {}, formatNumber],
  ["Logprob gap, engine against policy", "Absolute difference per token on equal weights, nats.", ["loss/logprob_gap_mean_nats", "loss/logprob_gap_max_nats"], ["mean", "max"], { log: true }, formatNumber],
  ["Completions that ended by themselves", "Share with finish reason stop.", ["rollout/stopped_fraction"], [], { min: 0, max: 1 }, formatShare],
  ["Throughput", "Sampled tokens per second.", ["rollout/tokens_per_second"], [], { min: 0 }, formatNumber],
  ["Cached context", "Share of context tokens taken from the engine's KV cache.", ["rollout/cached_context_fraction"], [], { min: 0, max: 1 }, formatShare],
  ["Learning rate", "As applied.", ["policy/learning_rate"], [], { min: 0 }, formatNumber],
];

function buildWarmUp(holder) {
  const warm = RUNS.filter((run) => Object.keys(run.sft_lines).length > 1);
  if (!warm.length) return;
  addCard(holder, "SFT warm-up", "Losses before reinforcement learning, by epoch.", (plot) => {
    const series = visible().flatMap((run) => Object.keys(run.sft_lines).filter((key) => key !== "step").map((key, i) => ({
      name: `${run.title}, ${key}`, color: run.ink, dash: i ? DOTTED : run.dash, marker: run.marker, points: zip(run.sft_lines.step, run.sft_lines[key]),
    })));
    lineChart(plot, { ...AXES.step, xTitle: "epoch", xName: "epoch", title: "SFT warm-up", series, y: {}, format: formatNumber, height: 240, smoothing: 0, empty: "The run with an SFT warm-up is hidden." });
  });
}

function buildDynamics() {
  const holder = document.getElementById("dynamics-charts");
  for (const [title, subtitle, keys, names, y, format] of DYNAMICS) {
    const key = names.length ? styleKey([[names[0], ""], [names[1], DOTTED]]) : null;
    addCard(holder, title, subtitle, (plot) => lineChart(plot, {
      ...AXES[STATE.axis], title, series: dynamicsSeries(keys, names), y, format, height: 240, smoothing: STATE.smoothing,
    }), key);
  }
  buildWarmUp(holder);
  document.getElementById("axis").addEventListener("change", (event) => {
    STATE.axis = event.target.value;
    redraw();
  });
  document.getElementById("smoothing").addEventListener("change", (event) => {
    STATE.smoothing = Number(event.target.value);
    redraw();
  });
}

function phaseKey() {
  const used = PHASES.filter((name) => RUNS.some((run) => run.time.phases[name]));
  return el("div", { class: "key" }, ...used.map((name) =>
    el("span", {}, el("i", { style: `background:var(--phase-${name})` }), name)));
}

function buildTime() {
  const holder = document.getElementById("time-charts");
  document.getElementById("phase-key").append(phaseKey());
  const bars = RUNS.map((run) => bucket(run.time.step, run.time.phases, 45));
  const total = (bar) => Object.values(bar.values).reduce((a, b) => a + b, 0);
  const max = Math.max(0, ...bars.flat().map(total));
  RUNS.forEach((run, i) => {
    const sums = PHASES.filter((name) => run.time.phases[name])
      .map((name) => [name, run.time.phases[name].reduce((a, b) => a + (b || 0), 0)]);
    const whole = sums.reduce((a, [, b]) => a + b, 0);
    const shares = sums.filter(([, seconds]) => seconds > 0).sort((a, b) => b[1] - a[1])
      .map(([name, seconds]) => `${name} ${Math.round((100 * seconds) / whole)}\u00a0%`);
    const size = bars[i].length ? bars[i][0].last - bars[i][0].first + 1 : 1;
    const subtitle = whole > 0 ? `${formatNumber(whole)} s in all: ${shares.join(", ")}` : "";
    addCard(holder, `Seconds per step, ${run.title}`, subtitle, (plot) => {
      if (!(whole > 0)) {
        plot.replaceChildren(emptyNote("No times have been recorded for this run."));
        return;
      }
      const named = bars[i].map((bar) => ({
        tip: bar.first === bar.last ? `step ${bar.first}` : `steps ${bar.first}–${bar.last}, mean`,
        parts: PHASES.filter((name) => run.time.phases[name]).map((name) => [name, bar.values[name], `var(--phase-${name})`]),
      }));
      stackedBars(plot, {
        bars: named, max, xTitle: size > 1 ? `step (each bar is the mean of ${size})` : "step", format: formatSeconds,
        xTicks: sparseTicks(bars[i].map((bar) => String(bar.first))), label: `Stacked bars of wall time per phase, ${run.title}: ${subtitle}`,
      });
    });
  });
}

function buildCollection() {
  const holder = document.getElementById("collection-charts");
  for (const run of RUNS.filter((one) => one.tries)) {
    const bins = doublingBins(run.tries.solved, run.tries.unsolved);
    const bars = bins.names.map((name, i) => ({
      tip: `${name} tries`, parts: [["solved", bins.solved[i], "var(--good)"], ["given up", bins.unsolved[i], "var(--phase-other)"]],
    }));
    const key = el("div", { class: "key" }, ...[["solved", "--good"], ["given up", "--phase-other"]].map(([name, color]) =>
      el("span", {}, el("i", { style: `background:var(${color})` }), name)));
    addCard(holder, `Tries per problem, ${run.title}`, "Problems by the number of tries they took, in bins that double.", (plot) =>
      stackedBars(plot, { bars, xTitle: "tries", format: String, xTicks: sparseTicks(bins.names), height: 250, label: `Histogram of tries per problem, ${run.title}` }), key);
  }
}

buildToggles();
buildAccuracy();
buildPrefixes();
buildBins();
buildDynamics();
buildTime();
buildCollection();
redraw();
buildReader(document.getElementById("reader"), JSON.parse(document.getElementById("rollouts").textContent));
