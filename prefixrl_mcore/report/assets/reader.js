// The rollout reader: a filtered list of groups, and one group with all its rollouts.

const READER_FILTERS = {
  reward: (rollout, value) => (value === "correct" ? rollout.reward > 0 : !(rollout.reward > 0)),
  finish: (rollout, value) => rollout.finish === value,
  reason: (rollout, value) => rollout.reason === value,
};

function selectBox(label, options, onChange) {
  const select = el("select", {}, ...options.map(([value, text]) => el("option", { value, text })));
  select.addEventListener("change", () => onChange(select.value));
  return { box: el("label", {}, label, select), select };
}

function distinct(groups, read) {
  return [...new Set(groups.flatMap(read))].filter((value) => value !== null && value !== "").sort();
}

const percent = (fraction) => `${(100 * fraction).toFixed(0)}\u00a0%`;

function pips(group) {
  const solved = group.rollouts.filter((one) => one.reward > 0).length;
  if (group.rollouts.length > 12) return el("span", { class: "small", text: `${solved} of ${group.rollouts.length}` });
  return el("span", { class: "pips", role: "img", "aria-label": `${solved} of ${group.rollouts.length} rewarded` },
    ...group.rollouts.map((one) => el("i", { class: one.reward > 0 ? "on" : null })));
}

function segment(kind, title, text) {
  return el("div", { class: `segment ${kind}` }, el("b", { text: title }), el("pre", { text }));
}

// Surprising tokens are darker: 0 nats is clear, 3 nats and more are full.
function tokenTint(hundredths) {
  const strength = isNumber(hundredths) ? Math.min(1, -hundredths / 300) : 0;
  return `background:color-mix(in srgb, var(--bad) ${(strength * 55).toFixed(0)}%, transparent)`;
}

const tokenTitle = (i, hundredths) =>
  `token ${i + 1}: ${isNumber(hundredths) ? `logprob ${(hundredths / 100).toFixed(2)} nats, probability ${Math.exp(hundredths / 100).toFixed(3)}` : "no logprob"}`;

function completionBody(rollout) {
  const pre = el("pre", {});
  if (!rollout.logprobs) {
    pre.textContent = rollout.text;
    return [pre];
  }
  if (rollout.ends) {
    let start = 0;
    rollout.ends.forEach((end, i) => {
      if (end > start) {
        pre.append(el("span", { class: "token", style: tokenTint(rollout.logprobs[i]), title: tokenTitle(i, rollout.logprobs[i]), text: rollout.text.slice(start, end) }));
      }
      start = Math.max(start, end);
    });
    pre.append(rollout.text.slice(start));
    return [pre];
  }
  pre.textContent = rollout.text;
  const shown = rollout.logprobs.slice(0, 600);
  const strip = el("div", { class: "strip", role: "img", "aria-label": "Logprob of each token, darker is less likely" },
    ...shown.map((logprob, i) => el("i", { style: tokenTint(logprob), title: tokenTitle(i, logprob) })));
  const left = rollout.logprobs.length - shown.length;
  return left ? [pre, strip, el("div", { class: "small", text: `Strip: the first 600 of ${rollout.logprobs.length} tokens.` })] : [pre, strip];
}

function rolloutCard(group, rollout) {
  const good = rollout.reward > 0;
  const advantage = isNumber(rollout.advantage) ? (rollout.advantage > 0 ? "+" : "") + rollout.advantage.toFixed(3) : "–";
  const extracted = rollout.extracted === null || rollout.extracted === "" ? "none found" : rollout.extracted;
  const segmentBox = el("div", { class: "segment completion" },
    el("b", { text: `Completion, ${rollout.tokens} tokens${rollout.logprobs ? "; hover for logprobs, darker is less likely" : ""}` }),
    ...completionBody(rollout));
  return el("article", { class: "rollout" },
    el("div", { class: "rollout-head" },
      el("b", { text: `Rollout ${rollout.i}` }),
      el("span", { class: `badge ${good ? "good" : "bad"}`, text: `reward ${isNumber(rollout.reward) ? rollout.reward : "–"}` }),
      el("span", { class: "badge", text: `advantage ${advantage}` }),
      el("span", { class: "badge", text: `verdict: ${rollout.reason}` }),
      el("span", { class: "badge", text: `ended by: ${rollout.finish}` })),
    el("div", { class: "answers" }, "Extracted ", el("code", { text: extracted }), " · reference ", el("code", { text: group.answer })),
    segmentBox);
}

function groupButton(entry, onPick) {
  const { run, group } = entry;
  const button = el("button", { class: "group-item", type: "button", style: `--run:${run.ink}`, onclick: () => onPick(entry) },
    el("span", { class: "row" }, el("span", { class: "name", text: group.problem }), el("span", { class: "small", text: `step ${group.step}` })),
    el("span", { class: "row" }, el("span", { class: "small", text: `${run.title} · ${group.fraction > 0 ? `prefix ${percent(group.fraction)}` : "no prefix"}${group.dropped ? " · not trained on" : ""}` }), pips(group)));
  entry.button = button;
  return button;
}

function showGroup(holder, entry, matching, move) {
  const { run, group } = entry;
  const rollouts = group.rollouts.filter(matching);
  const back = el("button", { type: "button", text: "Previous group", onclick: () => move(-1), disabled: entry.position === 0 });
  const next = el("button", { type: "button", text: "Next group", onclick: () => move(1), disabled: entry.isLast });
  const [oldest, newest] = group.versions;
  const versions = oldest === newest ? `policy version ${newest}` : `policy versions ${oldest} to ${newest}`;
  const where = `${run.title}, step ${group.step}, group ${group.group}, ${versions}${group.dropped ? ", not trained on" : ""}`;
  holder.replaceChildren(
    el("div", { class: "reader-head" }, el("h3", { text: group.problem }), el("div", { class: "pager" }, back, next)),
    el("p", { class: "small", text: `${where} · ${rollouts.length} of ${group.rollouts.length} rollouts match the filters` }),
    el("div", { class: "answers" }, "Reference answer ", el("code", { text: group.answer })),
    segment("prompt", `Prompt, ${group.prompt_tokens} tokens`, group.prompt),
    group.prefix_tokens
      ? segment("prefix", `Prefix, ${group.prefix_tokens} tokens, ${percent(group.fraction)} of trace ${group.trace}; conditioned on, never trained on`, group.prefix)
      : el("p", { class: "small", style: "margin:10px 0 0", text: "No prefix." }),
    ...rollouts.map((rollout) => rolloutCard(group, rollout)));
}

// Unlike scrollIntoView this never moves the page itself.
function scrollWithin(list, item) {
  const top = item.offsetTop;
  const bottom = top + item.offsetHeight;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
}

function buildReader(holder, choices) {
  const entries = choices.flatMap((groups, index) => groups.map((group) => ({ run: RUNS[index], group })));
  if (!entries.length) {
    holder.replaceChildren(emptyNote("No rollouts have been written yet."));
    return;
  }
  const groups = entries.map((entry) => entry.group);
  const state = { run: "", step: "", prefix: "", reward: "", finish: "", reason: "", text: "", limit: 100, current: null };
  const list = el("div", { class: "card group-list", "aria-label": "Groups" });
  const detail = el("div", { class: "card", "aria-live": "polite" });
  const count = el("span", { class: "small" });
  const matching = (rollout) => Object.entries(READER_FILTERS).every(([name, test]) => !state[name] || test(rollout, state[name]));
  const holds = ({ run, group }) =>
    (!state.run || String(run.index) === state.run) &&
    (!state.step || String(group.step) === state.step) &&
    (!state.prefix || (state.prefix === "prefixed") === group.fraction > 0) &&
    (!state.text || `${group.problem} ${group.prompt} ${group.prefix} ${group.rollouts.map((r) => r.text).join(" ")}`.toLowerCase().includes(state.text)) &&
    group.rollouts.some(matching);
  let found = [];
  const pick = (entry) => {
    state.current?.button?.removeAttribute("aria-current");
    state.current = entry;
    entry.button?.setAttribute("aria-current", "true");
    if (entry.button) scrollWithin(list, entry.button);
    entry.position = found.indexOf(entry);
    entry.isLast = entry.position === found.length - 1;
    showGroup(detail, entry, matching, (by) => {
      const target = found[entry.position + by];
      if (!target.button) {
        state.limit = found.length;
        fillList();
      }
      pick(target);
    });
  };
  const fillList = () => {
    for (const entry of entries) entry.button = null;
    list.replaceChildren(...found.slice(0, state.limit).map((entry) => groupButton(entry, pick)));
    if (found.length > state.limit) {
      list.append(el("button", { class: "more", type: "button", text: `Show all ${found.length} groups`, onclick: () => { state.limit = found.length; fillList(); } }));
    }
    state.current?.button?.setAttribute("aria-current", "true");
  };
  const update = () => {
    found = entries.filter(holds);
    state.limit = 100;
    const rollouts = found.reduce((sum, entry) => sum + entry.group.rollouts.filter(matching).length, 0);
    count.textContent = `${found.length} groups, ${rollouts} rollouts match`;
    if (!found.includes(state.current)) state.current = null;
    fillList();
    if (!found.length) detail.replaceChildren(emptyNote("No rollout matches these filters."));
    else pick(state.current || found[0]);
  };
  const filter = (label, name, options) => selectBox(label, [["", "all"], ...options], (value) => { state[name] = value; update(); }).box;
  const same = (values) => values.map((value) => [String(value), String(value)]);
  const steps = [...new Set(groups.map((group) => group.step))].sort((a, b) => a - b);
  const search = el("input", { type: "search", placeholder: "problem id or text", "aria-label": "Search problem id or text" });
  search.addEventListener("input", () => { state.text = search.value.trim().toLowerCase(); update(); });
  const used = [...new Set(entries.map((entry) => entry.run))];
  const controls = el("div", { class: "controls" },
    used.length > 1 ? filter("Run", "run", used.map((run) => [String(run.index), run.title])) : null,
    filter("Step", "step", same(steps)),
    filter("Prefix", "prefix", [["prefixed", "prefixed"], ["none", "no prefix"]]),
    filter("Reward", "reward", [["correct", "rewarded"], ["wrong", "not rewarded"]]),
    filter("Verdict", "reason", same(distinct(groups, (group) => group.rollouts.map((one) => one.reason)))),
    filter("Ended by", "finish", same(distinct(groups, (group) => group.rollouts.map((one) => one.finish)))),
    search, count);
  holder.replaceChildren(controls, el("div", { class: "reader" }, list, detail));
  const isMixed = ({ group }) => new Set(group.rollouts.map((one) => one.reward > 0)).size === 2;
  state.current = entries.find((entry) => entry.group.fraction > 0 && isMixed(entry)) || entries[0];
  update();
}
