// Runs a report's script outside a browser: just enough of a document to draw into.
// usage: node fake_dom.js REPORT.html   prints JSON: what it drew, and what was wrong after using it.
"use strict";
const fs = require("fs");
const vm = require("vm");

class Node {
  constructor(tag) {
    Object.assign(this, { tag, children: [], attributes: {}, listeners: {}, text: "", style: {}, value: "" });
    Object.assign(this, { clientWidth: 640, clientHeight: 480, offsetWidth: 120, offsetHeight: 60, offsetTop: 0, scrollTop: 0 });
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  removeAttribute(name) { delete this.attributes[name]; }
  addEventListener(name, listener) { (this.listeners[name] ||= []).push(listener); }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  getBoundingClientRect() { return { left: 0, top: 0, width: 640, height: 300 }; }
  set textContent(value) { this.children = []; this.text = String(value); }
  get textContent() { return this.text + this.children.map((c) => c.textContent ?? String(c)).join(" "); }
  get walk() { return [this, ...this.children.flatMap((c) => (c instanceof Node ? c.walk : []))]; }
}

const page = fs.readFileSync(process.argv[2], "utf8");
const byId = {};
for (const match of page.matchAll(/ id="([^"]+)"/g)) byId[match[1]] = new Node("div");
for (const match of page.matchAll(/<script type="application\/json" id="(\w+)">([\s\S]*?)<\/script>/g)) {
  byId[match[1]].textContent = match[2];
}
byId.axis.value = "flops";
byId.smoothing.value = "0.9";
const script = page.slice(page.lastIndexOf("<script>") + 8, page.lastIndexOf("</script>"));
const document = {
  createElement: (tag) => new Node(tag),
  createElementNS: (_, tag) => new Node(tag),
  getElementById: (id) => byId[id] ?? null,
};
const ResizeObserver = class { observe() {} disconnect() {} };
vm.runInNewContext(script, { document, ResizeObserver, WeakMap, requestAnimationFrame: (f) => f(), console });

delete byId.data;
delete byId.rollouts;
const all = () => Object.values(byId).flatMap((node) => node.walk);
const counts = {};
for (const node of all()) counts[node.tag] = (counts[node.tag] || 0) + 1;
const texts = all().map((node) => node.text).filter(Boolean);
const labels = all().map((node) => node.attributes["aria-label"]).filter(Boolean);
let fired = 0;
const fire = (node, name, event) => {
  if ("disabled" in node.attributes) return;
  for (const listener of node.listeners[name] || []) {
    listener({ preventDefault() {}, target: node, clientX: 300, clientY: 100, key: "ArrowRight", ...event });
    fired += 1;
  }
};
// Every handler runs once on what the page first drew, so that none of them can throw.
for (const node of all()) {
  for (const name of ["pointermove", "pointerenter", "keydown", "pointerleave", "change", "input", "click"]) fire(node, name, {});
}
const attributes = all().flatMap((node) => Object.entries(node.attributes).map(([k, v]) => `${k}=${v}`));
const broken = attributes.filter((text) => /NaN|undefined|Infinity/.test(text));
console.log(JSON.stringify({ counts, texts, labels, fired, broken }));
