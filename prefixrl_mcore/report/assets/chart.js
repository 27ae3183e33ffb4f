// Line charts: axes, bands, crosshair with a tooltip, keyboard, redrawn to the card's width.

const MARKS = {
  circle: (x, y, r) => svg("circle", { cx: x, cy: y, r }),
  square: (x, y, r) => svg("rect", { x: x - r * 0.9, y: y - r * 0.9, width: r * 1.8, height: r * 1.8 }),
  diamond: (x, y, r) =>
    svg("path", { d: `M${x} ${y - r * 1.3}L${x + r * 1.3} ${y}L${x} ${y + r * 1.3}L${x - r * 1.3} ${y}Z` }),
  triangle: (x, y, r) =>
    svg("path", { d: `M${x} ${y - r * 1.2}L${x + r * 1.15} ${y + r}L${x - r * 1.15} ${y + r}Z` }),
};

const textWidth = (text) => [...text].length * 6.9;

function emptyNote(text) {
  return el("div", { class: "empty", text });
}

// Places a tooltip beside a point of the plot, inside the plot's box.
function placeTip(tip, plot, x, y) {
  tip.hidden = false;
  const room = plot.clientWidth - x - tip.offsetWidth - 18;
  tip.style.left = `${Math.max(0, room > 0 ? x + 16 : x - tip.offsetWidth - 16)}px`;
  tip.style.top = `${Math.max(0, y - tip.offsetHeight - 10)}px`;
}

const observers = new WeakMap();

// Draws now, and again whenever the plot's width changes; a later call for the plot takes its place.
function redrawOnResize(plot, draw) {
  let width = 0;
  const drawIfNew = () => {
    const now = Math.floor(plot.clientWidth);
    if (now > 0 && now !== width) {
      width = now;
      draw(now);
    }
  };
  observers.get(plot)?.disconnect();
  const observer = new ResizeObserver(() => requestAnimationFrame(drawIfNew));
  drawIfNew();
  observers.set(plot, observer);
  observer.observe(plot);
}

// A tick's text under the axis, moved inside where it would leave the picture.
function tickText(at, y, width, text) {
  const half = textWidth(text) / 2;
  const x = Math.min(Math.max(at, half), width - half);
  return svg("text", { x, y, "text-anchor": "middle", text });
}

// Draws frame, grid, ticks and axis titles; returns how values map to pixels.
function drawFrame(root, width, height, x, y, options) {
  const labels = y.ticks.map(y.write);
  const left = Math.ceil(Math.max(...labels.map(textWidth), 18)) + 14;
  const box = { left, right: width - 14, top: options.top || 10, bottom: height - (options.xTitle ? 44 : 26) };
  const px = (value) => box.left + x.place(value) * (box.right - box.left);
  const py = (value) => box.bottom - y.place(value) * (box.bottom - box.top);
  y.ticks.forEach((tick, i) => {
    root.append(
      svg("line", { class: "grid-line", x1: box.left, x2: box.right, y1: py(tick), y2: py(tick) }),
      svg("text", { x: box.left - 8, y: py(tick) + 4, "text-anchor": "end", text: labels[i] }),
    );
  });
  root.append(svg("line", { class: "axis-line", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  for (const tick of x.ticks) {
    const at = px(tick);
    root.append(
      svg("line", { class: "axis-line", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 }),
      tickText(at, box.bottom + 18, width, x.write(tick)),
    );
  }
  if (options.xTitle) {
    root.append(
      svg("text", {
        class: "axis-title", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle",
        text: options.xTitle + x.unit,
      }),
    );
  }
  return { box, px, py };
}

// The shaded stretch that off-policy compute took, one row of text per run at the top.
function drawOffsets(root, frame, offsets) {
  const { box, px } = frame;
  const ends = offsets.map((offset) => px(offset.end));
  const widest = Math.max(...offsets.map((offset) => textWidth(offset.text)));
  const fits = widest < Math.min(...ends) - box.left - 12;
  const anchor = fits ? { x: Math.min(...ends) - 7, "text-anchor": "end" } : { x: Math.max(...ends) + 7, "text-anchor": "start" };
  offsets.forEach((offset, row) => {
    const end = ends[row];
    root.append(
      svg("rect", {
        x: box.left, y: box.top, width: Math.max(0, end - box.left), height: box.bottom - box.top,
        fill: offset.color, opacity: 0.09,
      }),
      svg("line", {
        x1: end, x2: end, y1: box.top, y2: box.bottom, stroke: offset.color, "stroke-width": 1.2,
        "stroke-dasharray": "2 3",
      }),
    );
    root.append(svg("text", { ...anchor, y: box.top + 13 + 16 * row, style: `fill:${offset.color}`, text: offset.text }));
  });
}

function pathOf(points, frame, y) {
  let pen = "M";
  let path = "";
  for (const [px, value] of points) {
    if (!isNumber(px) || !isNumber(value) || (y.log && value <= 0)) {
      pen = "M";
      continue;
    }
    path += `${pen}${frame.px(px).toFixed(1)} ${frame.py(value).toFixed(1)}`;
    pen = "L";
  }
  return path;
}

function bandOf(points, frame, y) {
  const clamp = (value) => Math.min(y.high, Math.max(y.low, value));
  const full = points.filter((p) => [0, 1, 2, 3].every((i) => isNumber(p[i])));
  if (full.length < 2) return "";
  const at = (x, value) => `${frame.px(x).toFixed(1)} ${frame.py(clamp(value)).toFixed(1)}`;
  const upper = full.map((p) => at(p[0], p[3]));
  const lower = full.map((p) => at(p[0], p[2])).reverse();
  return `M${upper.join("L")}L${lower.join("L")}Z`;
}

// One line per series; with smoothing the raw values stay visible, faint, behind it.
function drawSeries(root, frame, y, series, weight) {
  for (const one of series) {
    const group = svg("g", { fill: "none", stroke: one.color });
    const band = bandOf(one.points, frame, y);
    if (band) group.append(svg("path", { d: band, fill: one.color, stroke: "none", opacity: 0.13 }));
    const stroke = { "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": one.dash || null };
    if (weight > 0 && !one.exact) {
      const soft = smooth(one.points.map((p) => p[1]), weight);
      const line = one.points.map((p, i) => [p[0], soft[i]]);
      group.append(svg("path", { d: pathOf(one.points, frame, y), "stroke-width": 1, opacity: 0.28 }));
      group.append(svg("path", { d: pathOf(line, frame, y), ...stroke }));
    } else {
      group.append(svg("path", { d: pathOf(one.points, frame, y), ...stroke }));
    }
    const shown = one.points.filter((p) => isNumber(p[0]) && isNumber(p[1]) && !(y.log && p[1] <= 0));
    if (one.marker && (shown.length === 1 || (one.marks && shown.length <= 40))) {
      for (const p of shown) {
        group.append(assign(MARKS[one.marker](frame.px(p[0]), frame.py(p[1]), 3.2), { fill: one.color, stroke: "none" }));
      }
    }
    root.append(group);
  }
}

function nearest(points, x) {
  let best = null;
  for (const point of points) {
    if (!isNumber(point[0]) || !isNumber(point[1])) continue;
    if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
  }
  return best;
}

function describe(spec) {
  const last = spec.series.map((one) => {
    const known = one.points.filter((p) => isNumber(p[1]));
    return known.length ? `${one.name}: last value ${spec.format(known[known.length - 1][1])}` : `${one.name}: no value`;
  });
  return `${spec.title}. Line chart against ${spec.xTitle}. ${last.join("; ")}.`;
}

// Crosshair and tooltip, by pointer or by arrow keys.
function attachHover(plot, root, spec, frame, x, tip) {
  const { box, px, py } = frame;
  const marks = svg("g", {});
  root.append(marks);
  const xs = [...new Set(spec.series.flatMap((one) => one.points.map((p) => p[0])))].filter(isNumber).sort((a, b) => a - b);
  let index = -1;
  const hide = () => {
    tip.hidden = true;
    marks.replaceChildren();
  };
  const show = (value, top) => {
    if (!xs.length) return;
    const at = xs.reduce((a, b) => (Math.abs(b - value) < Math.abs(a - value) ? b : a));
    index = xs.indexOf(at);
    marks.replaceChildren(svg("line", { class: "cross", x1: px(at), x2: px(at), y1: box.top, y2: box.bottom }));
    tip.replaceChildren(el("b", { text: `${spec.xName} ${spec.xFormat(at)}` }));
    for (const one of spec.series) {
      const point = nearest(one.points, at);
      const first = one.points.find((p) => isNumber(p[0]));
      const far = point && Math.abs(px(point[0]) - px(at)) > Math.max(24, (box.right - box.left) / 12);
      if (!point || far || !first) continue;
      if (!(frame.log && point[1] <= 0)) {
        marks.append(svg("circle", { cx: px(point[0]), cy: py(point[1]), r: 4, fill: one.color, stroke: "var(--card)", "stroke-width": 1.5 }));
      }
      const range = isNumber(point[2]) && isNumber(point[3]) ? `${spec.format(point[2])}–${spec.format(point[3])}` : null;
      tip.append(el("div", {},
        el("i", { style: `background:${one.color}` }), el("span", { text: one.name }), el("b", { text: spec.format(point[1]) }),
        range && el("span", { class: "small", text: range })));
    }
    placeTip(tip, plot, px(at), top);
  };
  root.addEventListener("pointermove", (event) => {
    const bounds = root.getBoundingClientRect();
    const share = (event.clientX - bounds.left - box.left) / (box.right - box.left);
    const value = x.log ? x.low * (x.high / x.low) ** share : x.low + share * (x.high - x.low);
    show(value, event.clientY - bounds.top);
  });
  root.addEventListener("pointerleave", hide);
  root.addEventListener("blur", hide);
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !xs.length) return;
    event.preventDefault();
    index = Math.min(xs.length - 1, Math.max(0, index + step));
    show(xs[index], box.top + 60);
  });
}

// spec: title, series [{name, color, dash, marker, marks, points: [[x, y, low, high]]}], x/y axis
// options, xTitle, xName, xFormat, format, offsets, height, smoothing.
function lineChart(plot, spec) {
  const tip = el("div", { class: "tip", hidden: true });
  observers.get(plot)?.disconnect();
  const hasPoint = spec.series.some((one) => one.points.some((p) => isNumber(p[0]) && isNumber(p[1])));
  if (!hasPoint) {
    plot.replaceChildren(emptyNote(spec.empty || "Nothing has been recorded yet."));
    return;
  }
  redrawOnResize(plot, (width) => {
    const height = spec.height || 250;
    const values = spec.series.flatMap((one) => one.points.flatMap((p) => p.slice(1, spec.fitBands ? 4 : 2)));
    const offsets = spec.offsets || [];
    const xValues = spec.series.flatMap((one) => one.points.map((p) => p[0])).concat(offsets.map((o) => o.end));
    const x = makeAxis(xValues, { count: Math.max(3, Math.floor(width / 90)), ...spec.x });
    if (spec.fixedTicks) x.ticks = spec.fixedTicks;
    const y = makeAxis(values, { count: 5, pad: 0.05, ...spec.y });
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": describe(spec) });
    const frame = drawFrame(root, width, height, x, y, { xTitle: spec.xTitle });
    frame.log = y.log;
    drawOffsets(root, frame, offsets);
    drawSeries(root, frame, y, spec.series, spec.smoothing || 0);
    attachHover(plot, root, spec, frame, x, tip);
    plot.replaceChildren(root, tip);
  });
}
