// Heat maps, stacked bars and histograms.

function heatColor(value) {
  return `color-mix(in oklab, var(--heat-high) ${(100 * value).toFixed(1)}%, var(--heat-low))`;
}

// Rows are drawn from the bottom up. spec: rows (names), columns (steps), values[row][column].
function heatMap(plot, spec) {
  const tip = el("div", { class: "tip", hidden: true });
  redrawOnResize(plot, (width) => {
    const left = Math.ceil(Math.max(...spec.rows.map(textWidth))) + 10;
    const cellHeight = 30;
    const height = spec.rows.length * cellHeight + 44;
    const cellWidth = (width - left - 4) / spec.columns.length;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.label });
    const every = Math.max(1, Math.ceil(34 / cellWidth));
    spec.rows.forEach((name, r) => {
      const top = (spec.rows.length - 1 - r) * cellHeight;
      root.append(svg("text", { x: left - 8, y: top + cellHeight / 2 + 4, "text-anchor": "end", text: name }));
      spec.columns.forEach((column, c) => {
        const value = spec.values[r][c];
        const known = isNumber(value);
        const cell = svg("rect", {
          x: left + c * cellWidth, y: top, width: Math.max(1, cellWidth - 1.5), height: cellHeight - 1.5, rx: 2,
          style: `fill:${known ? heatColor(Math.min(1, Math.max(0, value))) : "var(--page)"}`,
          stroke: known ? "none" : "var(--line)",
        });
        cell.addEventListener("pointerenter", () => {
          tip.replaceChildren(
            el("b", { text: `step ${column}` }),
            el("div", {}, el("span", { text: name }), el("b", { text: known ? formatShare(value) : "not measured" })),
          );
          placeTip(tip, plot, left + (c + 0.5) * cellWidth, top + cellHeight);
        });
        root.append(cell);
        if (known && cellWidth >= 23) {
          const ink = value > 0.58 ? "var(--heat-ink-high)" : "var(--heat-ink-low)";
          root.append(svg("text", {
            x: left + (c + 0.5) * cellWidth, y: top + cellHeight / 2 + 4, "text-anchor": "middle",
            style: `fill:${ink};font-size:${cellWidth >= 32 ? 11.5 : 10.5}px;pointer-events:none`, text: value.toFixed(2).replace(/^0/, ""),
          }));
        }
      });
    });
    spec.columns.forEach((column, c) => {
      if (c % every) return;
      root.append(svg("text", {
        x: left + (c + 0.5) * cellWidth, y: spec.rows.length * cellHeight + 15, "text-anchor": "middle", text: column,
      }));
    });
    root.append(svg("text", { class: "axis-title", x: (left + width) / 2, y: height - 5, "text-anchor": "middle", text: "step" }));
    root.addEventListener("pointerleave", () => { tip.hidden = true; });
    plot.replaceChildren(root, tip);
  });
}

// spec: bars [{name, tip, parts: [[name, value, color]]}], xTicks(bar width) -> [[bar index, text]].
function stackedBars(plot, spec) {
  const tip = el("div", { class: "tip", hidden: true });
  redrawOnResize(plot, (width) => {
    const height = spec.height || 210;
    const totals = spec.bars.map((bar) => bar.parts.reduce((sum, part) => sum + part[1], 0));
    const ceiling = isNumber(spec.max) ? spec.max : Math.max(...totals);
    const y = makeAxis([0, ceiling], { min: 0, count: 4, pad: 0.04 });
    const x = { ticks: [], place: (value) => value / spec.bars.length, write: String, unit: "" };
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.label });
    const { box, px, py } = drawFrame(root, width, height, x, y, { xTitle: spec.xTitle });
    const barWidth = (box.right - box.left) / spec.bars.length;
    spec.bars.forEach((bar, i) => {
      let base = 0;
      const group = svg("g", {});
      for (const [, value, color] of bar.parts) {
        if (value <= 0) continue;
        const top = py(base + value);
        group.append(svg("rect", {
          x: px(i) + barWidth * 0.06, width: Math.max(1, barWidth * 0.88), y: top,
          height: Math.max(0, py(base) - top), style: `fill:${color}`,
        }));
        base += value;
      }
      const catcher = svg("rect", { x: px(i), width: barWidth, y: box.top, height: box.bottom - box.top, fill: "transparent" });
      catcher.addEventListener("pointerenter", () => {
        tip.replaceChildren(el("b", { text: bar.tip }));
        for (const [name, value, color] of [...bar.parts].reverse()) {
          tip.append(el("div", {}, el("i", { style: `background:${color}` }), el("span", { text: name }), el("b", { text: spec.format(value) })));
        }
        placeTip(tip, plot, px(i + 0.5), box.top + 50);
      });
      group.append(catcher);
      root.append(group);
    });
    for (const [index, text] of spec.xTicks(barWidth)) {
      root.append(tickText(px(index + 0.5), box.bottom + 18, width, text));
    }
    root.addEventListener("pointerleave", () => { tip.hidden = true; });
    plot.replaceChildren(root, tip);
  });
}

// Every n-th bar gets a label, so that labels do not touch.
function sparseTicks(texts) {
  return (barWidth) => {
    const every = niceCount((Math.max(...texts.map(textWidth)) + 8) / barWidth);
    return texts.map((text, i) => [i, text]).filter(([i]) => i % every === 0);
  };
}

// Counts of tries in bins that double: 1, 2, 3-4, 5-8, ...
function doublingBins(solved, unsolved) {
  const binOf = (tries) => Math.max(0, Math.ceil(Math.log2(Math.max(1, tries))));
  const last = Math.max(0, ...[...solved, ...unsolved].map(binOf));
  const names = Array.from({ length: last + 1 }, (_, b) => (b < 2 ? String(2 ** b) : `${2 ** (b - 1) + 1}–${2 ** b}`));
  const count = (tries) => {
    const counts = new Array(last + 1).fill(0);
    for (const one of tries) counts[binOf(one)] += 1;
    return counts;
  };
  return { names, solved: count(solved), unsolved: count(unsolved) };
}
