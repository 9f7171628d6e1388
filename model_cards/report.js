// The browser of chains and of answers in report.html. Texts of models are untrusted: they are only ever set as
// textContent. The data is gzipped JSON in base64, in the element #data; `report/texts.py` writes it.
"use strict";

const ROW = 58; // height of a row of the list in pixels, as in report.css
const LONGEST_DIFF = 4e6; // words times words, above which no difference is looked for

const $ = (id) => document.getElementById(id);
const has = (value) => value !== null && value !== undefined;
const number = (value) => (has(value) ? value.toFixed(3).replace("-", "−") : "–");
const signed = (value) => (has(value) ? (value > 0 ? "+" : "") + number(value) : "–");

/** Return a new element with children: strings become text nodes. */
function make(tag, classes, ...children) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  element.append(...children);
  return element;
}

async function unpack(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// -- differences of words

// Spaces, single letters of scripts without spaces, and words.
const UNSPACED = "\\u0e00-\\u0eff\\u3040-\\u30ff\\u3400-\\u9fff";
const WORDS = new RegExp(`\\s+|[${UNSPACED}]|[^\\s${UNSPACED}]+`, "g");

/** Return [[sign, text], ...]: "=" in both, "-" only before, "+" only after; the longest common subsequence of words. */
function wordDiff(before, after) {
  const a = before.match(WORDS) || [], b = after.match(WORDS) || [];
  if (a.length * b.length > LONGEST_DIFF) return [["-", before], ["+", after]];
  const width = b.length + 1, lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      lengths[i * width + j] = a[i] === b[j]
        ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
  const out = [];
  const push = (sign, text) => {
    if (out.length && out[out.length - 1][0] === sign) out[out.length - 1][1] += text;
    else out.push([sign, text]);
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) push("=", a[i++]), j++;
    else if (j === b.length || (i < a.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) push("-", a[i++]);
    else push("+", b[j++]);
  }
  return joined(out);
}

/** Join changes that only a word or two lie between: one sentence instead of another is one change, not ten. */
function joined(parts) {
  const out = [];
  let before = "", after = "";
  const flush = () => {
    if (before) out.push(["-", before]);
    if (after) out.push(["+", after]);
    before = after = "";
  };
  parts.forEach(([sign, text], at) => {
    if (sign === "-") before += text;
    else if (sign === "+") after += text;
    else if ((before || after) && at < parts.length - 1 && text.trim().split(/\s+/).length <= 2) before += text, after += text;
    else flush(), out.push(["=", text]);
  });
  flush();
  return out;
}

function diffText(before, after) {
  const box = make("div", "text");
  for (const [sign, text] of wordDiff(before, after))
    box.append(sign === "=" ? text : make(sign === "-" ? "del" : "ins", "", text));
  return box;
}

// -- what is shown: chains, and answers of the arms

function scoreLine(text) {
  const parts = [has(text.reward) ? `reward ${number(text.reward)}` : `unscored${text.unscored ? `: ${text.unscored}` : ""}`];
  if (text.defect) parts.push(text.defect);
  return parts.join("; ");
}

/** Return the state of a chain before each of its steps, and the last one: texts with their scores. */
function states(chain) {
  const out = [chain.answer];
  for (const step of chain.steps) out.push(step.rejected ? out[out.length - 1] : step);
  return out;
}

const CHAINS = {
  items: (data) => data.chains,
  texts: (c) => [c.answer.text, ...c.steps.flatMap((s) => [s.critique, s.text])],
  final: (c) => { const all = states(c); return all[all.length - 1]; },
  value(c) { const last = this.final(c); return last.defect ? null : last.reward; },
  gain(c) {
    const last = this.value(c);
    return has(last) && has(c.answer.reward) && !c.answer.defect ? last - c.answer.reward : null;
  },
  outcomes: (c) => [
    ...(c.row ? ["became a training row"] : []),
    c.steps.some((s) => !s.rejected) ? "a revision was accepted" : "no revision was accepted",
    ...new Set(c.steps.filter((s) => s.rejected).map((s) => `rejected: ${s.rejected}`)),
  ],
  label: "gain",
  detail(c) {
    const before = states(c), out = [];
    const answer = make("section", "turn", make("h4", "", "First answer ", make("span", "chip", scoreLine(c.answer))));
    answer.append(make("div", "text", c.answer.text), ...whole(c.answer));
    out.push(answer);
    c.steps.forEach((step, i) => {
      const decision = step.rejected ? make("span", "chip no", `rejected: ${step.rejected}`) : make("span", "chip yes", "accepted");
      const turn = make("section", "turn", make("h4", "", `Step ${i + 1} `, decision, make("span", "chip", scoreLine(step))));
      turn.append(make("p", "label", "Critique"), make("div", "text quiet", step.critique), ...onDemand("What the model thought before it", step.critique_thought));
      turn.append(make("p", "label", "Revision, against the text before"), diffText(before[i].text, step.text), ...whole(step));
      out.push(turn);
    });
    return out;
  },
};

/** Return a closed part that shows a text on demand; nothing without a text. */
function onDemand(title, text) {
  return text ? [make("details", "", make("summary", "label", title), make("div", "text", text))] : [];
}

function whole(text) {
  return [...onDemand("What the model thought before it", text.thought), ...onDemand("As the model wrote it", text.raw)];
}

const ANSWERS = {
  items: (data) => data.answers,
  texts: (a) => Object.values(a.arms).map((arm) => arm.text),
  value: (a) => (a.arms.distilled || Object.values(a.arms)[0]).reward,
  gain(a) {
    const { base, distilled } = a.arms;
    return base && distilled && has(base.reward) && has(distilled.reward) ? a.sign * (distilled.reward - base.reward) : null;
  },
  outcomes(a) {
    const gain = this.gain(a);
    const better = !has(gain) ? "not compared" : gain > 0 ? "distilled is better" : gain < 0 ? "distilled is worse" : "alike";
    return [better, ...new Set(Object.values(a.arms).filter((arm) => arm.defect).map((arm) => `an answer is not clean: ${arm.defect}`))];
  },
  label: "distilled − base",
  detail(a) {
    const grid = make("div", "answers");
    for (const [arm, answer] of Object.entries(a.arms)) {
      const scores = Object.entries(answer.scores).map(([name, value]) => `${name} ${has(value) ? number(value) : "unscored"}`);
      if (answer.defect) scores.push(answer.defect);
      if (answer.cut) scores.push("cut off");
      const label = make("h4", "", make("span", `dot ${arm}`), arm.replaceAll("_", "-"));
      grid.append(make("section", "answer", label, make("div", "text", answer.text), make("p", "score", scores.join("; ")), ...whole(answer)));
    }
    return [grid];
  },
};

const SORTS = {
  "by id": null,
  "largest gain": (view, a, b) => order(view.gain(a), view.gain(b), -1),
  "smallest gain": (view, a, b) => order(view.gain(a), view.gain(b), 1),
  "largest reward": (view, a, b) => order(view.value(a), view.value(b), -1),
  "smallest reward": (view, a, b) => order(view.value(a), view.value(b), 1),
};
// What has no value comes last in either direction.
const order = (a, b, sign) => (has(a) ? 0 : 1) - (has(b) ? 0 : 1) || sign * ((a ?? 0) - (b ?? 0));

// -- the browser

class Browser {
  constructor(data) {
    this.data = data;
    this.haystacks = new Map();
    this.view = CHAINS;
    $("view").addEventListener("change", () => this.open($("view").value === "answers" ? ANSWERS : CHAINS));
    for (const id of ["search", "split", "group", "outcome", "sort"])
      $(id).addEventListener(id === "search" ? "input" : "change", () => this.update());
    const list = $("list");
    list.addEventListener("scroll", () => this.draw(), { passive: true });
    list.addEventListener("keydown", (event) => this.key(event));
    list.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) this.select(Number(row.dataset.at));
    });
    new ResizeObserver(() => this.draw()).observe(list);
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) {
        event.preventDefault();
        $("search").focus();
      }
    });
    if (!data.answers.length) $("view").querySelector("[value=answers]").disabled = true;
    this.open(data.chains.length ? CHAINS : ANSWERS);
    this.prepare(0);
  }

  /** Make the texts ready for the first search while nothing else is to be done. */
  prepare(from) {
    const all = this.view.items(this.data), to = Math.min(from + 500, all.length);
    for (let at = from; at < to; at++) this.haystack(all[at]);
    if (to < all.length) setTimeout(() => this.prepare(to), 0);
  }

  open(view) {
    this.view = view;
    $("view").value = view === ANSWERS ? "answers" : "chains";
    const all = view.items(this.data), prompts = this.data.prompts;
    this.fill("outcome", "any outcome", all.flatMap((item) => view.outcomes(item)));
    this.fill("split", "all splits", all.map((item) => prompts[item.prompt].split));
    const grouped = prompts.some((prompt) => prompt.group !== prompt.text && prompt.group);
    $("group").parentElement.hidden = !grouped;
    this.fill("group", "all groups", grouped ? all.map((item) => prompts[item.prompt].group) : []);
    this.fill("sort", null, Object.keys(SORTS));
    this.update();
  }

  fill(id, any, values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
    const names = [...counts.keys()];
    const select = $(id), before = select.value;
    if (any !== null) names.sort((a, b) => a.localeCompare(b));
    const options = names.map((name) => new Option(any === null ? name : `${name} (${counts.get(name).toLocaleString("en")})`, name));
    select.replaceChildren(...(any === null ? [] : [new Option(any, "")]), ...options);
    if (counts.has(before)) select.value = before;
  }

  haystack(item) {
    let text = this.haystacks.get(item);
    if (text === undefined) {
      const prompt = this.data.prompts[item.prompt];
      const before = (prompt.before || []).map((turn) => turn.text);
      text = [...before, prompt.text, prompt.group, prompt.id, ...this.view.texts(item)].join("\n").toLowerCase();
      this.haystacks.set(item, text);
    }
    return text;
  }

  update() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), prompts = this.data.prompts;
    const [split, group, outcome] = ["split", "group", "outcome"].map((id) => $(id).value);
    const all = this.view.items(this.data);
    this.shown = all.filter((item) =>
      (!split || prompts[item.prompt].split === split) &&
      (!group || prompts[item.prompt].group === group) &&
      (!outcome || this.view.outcomes(item).includes(outcome)) &&
      (!words.length || words.every((word) => this.haystack(item).includes(word))));
    const sort = SORTS[$("sort").value];
    if (sort) this.shown.sort((a, b) => sort(this.view, a, b));
    const n = (count) => count.toLocaleString("en");
    $("count").textContent = `${n(this.shown.length)} of ${n(all.length)} ${this.view === CHAINS ? "chains" : "prompts"}`;
    $("list").scrollTop = 0;
    this.select(0);
  }

  /** Draw the rows that can be seen, and a few around them. */
  draw() {
    const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(this.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
    const rows = [];
    for (let at = first; at < last; at++) rows.push(this.row(this.shown[at], at));
    $("rows").style.height = `${this.shown.length * ROW}px`;
    $("rows").replaceChildren(...rows);
    list.setAttribute("aria-activedescendant", this.selected >= first && this.selected < last ? `row-${this.selected}` : "");
  }

  row(item, at) {
    const prompt = this.data.prompts[item.prompt], gain = this.view.gain(item);
    const sign = gain > 0 ? "up" : gain < 0 ? "down" : "";
    const row = make("div", "row", make("span", "title", prompt.text), make("span", `gain ${sign}`, has(gain) ? signed(gain) : "–"),
      make("span", "about", [prompt.split, prompt.group !== prompt.text ? prompt.group : "", item.row ? "training row" : ""].filter(Boolean).join(" · ")),
      make("span", "about end", number(this.view.value(item))));
    row.id = `row-${at}`;
    row.dataset.at = at;
    row.style.top = `${at * ROW}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(at === this.selected));
    row.setAttribute("aria-posinset", at + 1);
    row.setAttribute("aria-setsize", this.shown.length);
    return row;
  }

  select(at) {
    this.selected = Math.max(0, Math.min(at, this.shown.length - 1));
    const list = $("list"), top = this.selected * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    this.draw();
    const item = this.shown[this.selected], detail = $("detail");
    if (!item) return detail.replaceChildren(make("p", "note", "Nothing fits. Take a filter or a word of the search away."));
    const prompt = this.data.prompts[item.prompt];
    const number_ = this.view === CHAINS ? `, chain ${item.chain}` : item.sample ? `, sample ${item.sample}` : "";
    const where = `${prompt.split}${prompt.group !== prompt.text ? `, ${prompt.group}` : ""}${prompt.kind ? `, ${prompt.kind}` : ""}; prompt ${prompt.id}${number_}`;
    const before = (prompt.before || []).map((turn) => make("div", "before", make("p", "label", turn.role), make("div", "text", turn.text)));
    if (before.length) before.push(make("p", "label", "user"));
    detail.replaceChildren(make("p", "label", where), ...before, make("div", "text prompt", prompt.text), ...this.view.detail(item));
    detail.scrollTop = 0;
  }

  key(event) {
    const page = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.shown.length, End: this.shown.length };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.select(this.selected + moves[event.key]);
  }
}

/** Give the cells of tables of numbers their column's title, which a narrow page shows in each cell (report.css). */
function labelCells() {
  for (const table of document.querySelectorAll(".scroll > table:not(.words, .plain)")) {
    const titles = [...table.querySelectorAll("thead th")].map((title) => title.innerText.replace(/\s+/g, " ").trim());
    for (const row of table.querySelectorAll("tbody tr")) [...row.cells].forEach((cell, i) => { cell.dataset.title = titles[i] || ""; });
    table.classList.add("titled");
  }
}

labelCells();
unpack($("data").textContent)
  .then((data) => {
    window.browser = new Browser(data);
    $("browser").hidden = false;
    $("waiting").hidden = true;
    window.browser.draw(); // it had no height before
  })
  .catch((error) => {
    $("waiting").textContent = `The chains could not be shown: ${error.message}. A browser of 2023 or later is needed.`;
  });
