// Elements, numbers and axes. All text from runs enters the page through textContent only.

const SVG_NS = "http://www.w3.org/2000/svg";

function assign(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children || []) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

function el(tag, attributes, ...children) {
  return assign(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return assign(document.createElementNS(SVG_NS, tag), attributes, children);
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const superscript = (exponent) =>
  (exponent < 0 ? "⁻" : "") +
  [...String(Math.abs(exponent))].map((digit) => SUPERSCRIPTS[Number(digit)]).join("");

// Three significant digits; powers of ten below 0.001 and from a million on.
function formatNumber(value) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${Number(mantissa)}×10${superscript(Number(exponent))}`;
  }
  if (size >= 100) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

const formatShare = (value) => (isNumber(value) ? value.toFixed(3) : "–");
const formatSeconds = (value) => (isNumber(value) ? `${formatNumber(value)} s` : "–");

// Ticks at 1, 2 or 5 times a power of ten, inside [low, high].
function linearTicks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const raw = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((candidate) => candidate >= raw * 0.75);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

// Powers of ten inside [low, high]; with fewer than two of them, 2 and 5 times them as well.
function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low) + 1e-9);
  const last = Math.ceil(Math.log10(high) - 1e-9);
  const inside = (value) => value >= low * 0.999 && value <= high * 1.001;
  const powers = [];
  for (let e = first; e <= last; e += 1) powers.push(10 ** e);
  const whole = powers.filter(inside);
  if (whole.length >= 2) {
    const every = Math.ceil(whole.length / Math.max(2, count));
    return whole.filter((_, i) => i % every === 0);
  }
  return powers.flatMap((p) => [p, 2 * p, 5 * p]).filter(inside);
}

// An axis: domain, ticks and how ticks are written. FLOPs share one power of ten in the title.
function makeAxis(values, options) {
  const finite = values.filter(isNumber);
  const usable = options.log ? finite.filter((value) => value > 0) : finite;
  let low = usable.reduce((a, b) => Math.min(a, b), Infinity);
  let high = usable.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!usable.length) [low, high] = options.log ? [1, 10] : [0, 1];
  if (isNumber(options.min)) low = options.min;
  if (isNumber(options.max)) high = options.max;
  if (options.log) {
    low /= 1.25;
    high *= 1.25;
  } else if (high <= low) {
    [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, low + Math.abs(low) * 0.1];
  } else if (options.pad) {
    const margin = (high - low) * options.pad;
    if (!isNumber(options.max)) high += margin;
    if (!isNumber(options.min)) low -= margin;
  }
  const ticks = (options.log ? logTicks : linearTicks)(low, high, options.count || 5);
  const largest = Math.max(Math.abs(low), Math.abs(high));
  const exponent = options.shared && largest > 0 ? Math.floor(Math.log10(largest)) : 0;
  const scale = 10 ** exponent;
  const write = options.log
    ? (value) => {
        const [mantissa, power] = value.toExponential(0).split("e");
        const small = Number(power) >= -2 && Number(power) <= 3;
        if (small) return formatNumber(value);
        return (mantissa === "1" ? "10" : `${mantissa}×10`) + superscript(Number(power));
      }
    : (value) => formatNumber(Number((value / scale).toPrecision(6)));
  const unit = exponent ? ` (×10${superscript(exponent)})` : "";
  const place = options.log
    ? (value) => Math.log(value / low) / Math.log(high / low)
    : (value) => (value - low) / (high - low);
  return { low, high, ticks, write, unit, place, log: Boolean(options.log) };
}

// Exponential moving average that does not start at zero; gaps stay gaps.
function smooth(values, weight) {
  let sum = 0;
  let norm = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    sum = sum * weight + value * (1 - weight);
    norm = norm * weight + (1 - weight);
    return sum / norm;
  });
}

// The smallest of 1, 2, 5, 10, 20, ... that is at least `value`.
function niceCount(value) {
  let power = 1;
  while (power * 5 < value) power *= 10;
  return [1, 2, 5].map((m) => m * power).find((m) => m >= value);
}

// Steps of a long run are averaged into at most `count` bars.
function bucket(steps, columns, count) {
  const size = niceCount(steps.length / count);
  const bars = [];
  for (let start = 0; start < steps.length; start += size) {
    const end = Math.min(start + size, steps.length);
    const values = {};
    for (const [name, column] of Object.entries(columns)) {
      const part = column.slice(start, end).filter(isNumber);
      values[name] = part.length ? part.reduce((a, b) => a + b, 0) / part.length : 0;
    }
    bars.push({ first: steps[start], last: steps[end - 1], values });
  }
  return bars;
}
