"use strict";
(() => {
  const block = document.getElementById("rollouts-data");
  const stage = document.getElementById("viewer");
  if (!block || !stage) return;
  const data = JSON.parse(block.textContent);
  const find = (name) => document.getElementById("viewer-" + name);
  const method = find("method"), seed = find("seed"), range = find("step"), label = find("at");
  const back = find("back"), next = find("next"), readout = find("readout"), only = find("only");

  // Everything that came from a run becomes a text node: nothing of it is ever parsed as HTML.
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const format = (value) => {
    if (value === undefined || value === null) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
    return text.replace("-", "−");
  };
  const labels = [...new Set(data.runs.map((run) => run.label))];
  const FOLD = 200; // tokens of a long response shown before it is unfolded
  let step = null;

  const fill = (select, items) => {
    select.replaceChildren(...items.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }));
  };
  const current = () => data.runs[Number(seed.value)];

  function pickMethod() {
    const wanted = labels[Number(method.value)];
    const items = [];
    data.runs.forEach((run, index) => {
      if (run.label === wanted) items.push([index, run.seed === null ? run.name : `${run.seed} (${run.name})`]);
    });
    fill(seed, items);
    pickRun();
  }

  function pickRun() {
    const run = current();
    const steps = run.steps.map((entry) => entry.step);
    range.max = steps.length - 1;
    if (step === null) step = steps[steps.length - 1];
    let nearest = 0;
    steps.forEach((value, index) => { if (Math.abs(value - step) < Math.abs(steps[nearest] - step)) nearest = index; });
    range.value = nearest;
    find("low").textContent = "−" + format(run.scale);
    find("high").textContent = "+" + format(run.scale);
    show();
  }

  function show() {
    const run = current();
    const index = Number(range.value);
    const entry = run.steps[index];
    label.textContent = `step ${entry.step} (${index + 1} of ${run.steps.length})`;
    range.setAttribute("aria-valuetext", `step ${entry.step}`);
    back.disabled = index === 0;
    next.disabled = index === run.steps.length - 1;
    readout.textContent = "Point at a token, or tap it, to read its advantage.";
    stage.replaceChildren(...entry.groups.map((group) => drawGroup(group, run)).filter(Boolean));
    if (!stage.childElementCount) stage.append(make("p", "missing", "No rollout with this verdict at this step."));
  }

  function drawGroup(group, run) {
    const rollouts = group.rollouts.filter((rollout) => only.value === "all" || rollout.verdict === only.value);
    if (!rollouts.length) return null;
    const box = make("div", "prompt");
    const heading = make("h3", "", group.id);
    const correct = group.rollouts.filter((rollout) => rollout.verdict === "correct").length;
    heading.append(make("small", "", `${correct} of ${group.rollouts.length} logged rollouts correct`));
    box.append(heading);
    if (group.prompt) box.append(make("pre", "", group.prompt));
    const heaviest = Math.max(...group.rollouts.map((r) => Math.abs(r.reinforce || r.distill || 0)));
    rollouts.forEach((rollout) => box.append(drawRollout(rollout, run, heaviest)));
    return box;
  }

  function drawRollout(rollout, run, heaviest) {
    const name = rollout.verdict === "no verdict" ? "unjudged" : rollout.verdict;
    const card = make("div", `rollout ${name}${rollout.masked ? " masked" : ""}`);
    const side = make("div");
    side.append(make("div", "verdict", rollout.verdict + (rollout.truncated ? ", truncated" : "")));
    const weight = rollout.reinforce || rollout.distill || 0;
    const bar = make("div", "weight");
    const inner = make("i");
    inner.style.width = heaviest > 0 ? `${(100 * Math.abs(weight)) / heaviest}%` : "0";
    bar.append(inner);
    bar.title = "weight, relative to the heaviest rollout of its group";
    side.append(bar, make("div", "size", `weight ${format(weight)}`));
    const facts = make("ul", "facts");
    const fact = (text, value, after) => {
      const item = make("li", "", text);
      item.append(make("b", "", value), after || "");
      facts.append(item);
    };
    if (rollout.masked) fact("left out: ", rollout.masked);
    fact("reinforce ", format(rollout.reinforce));
    fact("distill ", format(rollout.distill));
    if (rollout.ppl !== undefined) fact(`${rollout.ppl_of}’s perplexity `, format(rollout.ppl));
    fact("", String(rollout.length), " tokens");
    if (rollout.extracted !== undefined) fact("answer ", rollout.extracted);
    const right = make("div");
    right.append(drawTokens(rollout, run), facts);
    card.append(side, right);
    return card;
  }

  function drawTokens(rollout, run) {
    const text = make("div", "tokens");
    const long = rollout.tokens.length > 1.3 * FOLD;
    appendTokens(text, rollout, run, 0, long ? FOLD : rollout.tokens.length);
    if (long) {
      const more = make("button", "unfold", `… show all ${rollout.length} tokens`);
      more.type = "button";
      more.addEventListener("click", () => {
        more.remove();
        appendTokens(text, rollout, run, FOLD, rollout.tokens.length);
      });
      text.append(more);
    }
    return text;
  }

  function appendTokens(text, rollout, run, from, to) {
    const advantages = rollout.advantages;
    for (let place = from; place < to; place += 1) {
      const id = rollout.tokens[place];
      if (rollout.cut && place === rollout.cut.after) text.append(make("span", "cut", ` … ${rollout.cut.tokens} tokens not shown … `));
      const raw = data.vocabulary[id];
      const span = make("span", "", raw.replace(/\n/g, "⏎\n"));
      const advantage = advantages === undefined ? undefined : typeof advantages === "number" ? advantages : advantages[place];
      if (advantage !== undefined && Math.abs(advantage) > 1e-9) {
        // square root: small advantages stay visible beside large ones
        span.className = advantage > 0 ? "p" : "n";
        span.style.setProperty("--a", Math.min(1, Math.sqrt(Math.abs(advantage) / (run.scale || 1))).toFixed(3));
      }
      span.dataset.note = `${JSON.stringify(raw)}: advantage ${advantage === undefined ? "not recorded" : format(advantage)}`;
      text.append(span, "\u200b"); // a place to break the line
    }
  }

  const read = (event) => {
    const note = event.target.dataset && event.target.dataset.note;
    if (note) readout.textContent = note;
  };
  stage.addEventListener("mouseover", read);
  stage.addEventListener("click", read);
  method.addEventListener("change", pickMethod);
  seed.addEventListener("change", pickRun);
  only.addEventListener("change", show);
  const move = () => { step = current().steps[Number(range.value)].step; show(); };
  range.addEventListener("input", move);
  back.addEventListener("click", () => { range.value = Number(range.value) - 1; move(); });
  next.addEventListener("click", () => { range.value = Number(range.value) + 1; move(); });
  fill(method, labels.map((text, index) => [index, text]));
  document.getElementById("viewer-controls").hidden = false;
  pickMethod();
})();
