"use strict";
// Text of the job's becomes text nodes and attributes, never markup: nothing here parses HTML.

const summary = JSON.parse(document.getElementById("summary").textContent);
const $ = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const brief = (value) => Number(value).toPrecision(3).replace(/\.?0+$/, "").replace(/\.?0+e/, "e");

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  element.append(...children);
  return element;
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function span(seconds) {
  const hours = Math.floor(seconds / 3600), minutes = Math.floor(seconds / 60) % 60;
  if (hours >= 100) return `${whole.format(Math.round(hours / 24))} days`;
  if (hours) return `${hours} h ${String(minutes).padStart(2, "0")} min`;
  return minutes ? `${minutes} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s` : `${Math.floor(seconds)} s`;
}

// -- data: inside the page, or in a file beside it that hands it over by calling arrived() ------------------------

const awaited = new Map();

function arrived(name, content) {
  const found = awaited.get(name);
  if (found) found(content);
}

function data(name) {
  const inside = $(`data-${name}`);
  if (inside) return Promise.resolve(JSON.parse(inside.textContent));
  return new Promise((resolve, reject) => {
    awaited.set(name, resolve);
    const script = make("script", { src: `report/${name}.js`, async: true });
    script.onload = () => { awaited.delete(name); script.remove(); };
    script.onerror = () => { awaited.delete(name); script.remove(); reject(new Error(name)); };
    document.head.append(script);
  });
}

async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// -- figures and charts ------------------------------------------------------------------------------------------

const { timeline } = summary;
const made = timeline.images.reduce((sum, images) => sum + images, 0);

function figures() {
  const done = summary.committed + summary.quarantined;
  const left = summary.planned - done;
  const add = (value, label, kind = "") => {
    const figure = make("div", { className: `figure ${kind}` }, make("b", { textContent: value }), make("span", { textContent: label }));
    $("figures").append(figure);
    return figure;
  };
  const share = Math.floor((1000 * done) / Math.max(summary.planned, 1)) / 10;
  const meter = make("i", {});
  meter.style.width = `${share}%`;
  add(`${share} %`, `${whole.format(done)} of ${whole.format(summary.planned)} images`).append(make("div", { className: "meter" }, meter));
  add(whole.format(summary.committed), "pictures");
  add(whole.format(summary.quarantined), "quarantined", summary.quarantined ? "bad" : "");
  if (timeline.seconds) add(`${brief(made / timeline.seconds)}/s`, `images, over ${span(timeline.seconds)} of work`);
  if (left && summary.images_per_second) add(span(left / summary.images_per_second), "left at the latest speed");
  add(summary.bytes < 1e6 ? `${whole.format(Math.round(summary.bytes / 100) / 10)} kB` : `${whole.format(Math.round(summary.bytes / 1e5) / 10)} MB`, "of pictures");
  const when = new Date(summary.written * 1000).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
  $("facts").textContent = `${summary.state} · ${summary.model} · ${summary.output} · as of ${when}`;
  $("facts").title = summary.devices.map(([told, count]) => `${whole.format(count)} images: ${told}`).join("\n");
}

function tip(event, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
  box.style.left = `${left}px`;
  box.style.top = `${event.clientY > 60 ? event.clientY - 38 : event.clientY + 18}px`;
}

// A curve over working time: values at the ends of equal spans, with pauses marked.
function chart(title, values, options) {
  const width = 560, height = 150, low = 18, left = 52;
  const most = Math.max(...values, options.target || 0) || 1;
  const x = (place) => left + ((width - left) * place) / Math.max(values.length - 1, 1);
  const y = (value) => low + (height - low) * (1 - value / most);
  const points = values.map((value, place) => `${x(place).toFixed(1)},${y(value).toFixed(1)}`);
  if (points.length === 1) points.push(`${width},${y(values[0]).toFixed(1)}`);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height + 22}`, role: "img", "aria-label": `${title}: ${options.told}` });
  for (const part of [0, 0.5, 1]) {
    svg.append(drawn("line", { class: "axis", x1: left, x2: width, y1: y(most * part), y2: y(most * part) }));
    svg.append(drawn("text", { x: left - 7, y: y(most * part) + 4, "text-anchor": "end" }, options.scale(most * part)));
  }
  for (const [at, seconds] of timeline.pauses) {
    const line = drawn("line", { class: "pause", x1: 0, x2: 0, y1: low - 8, y2: height });
    const place = left + ((width - left) * at) / timeline.seconds;
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.append(drawn("title", {}, `stopped for ${span(seconds)}`));
    svg.append(line, drawn("text", { x: place + 4, y: low - 2 }, `stopped ${span(seconds)}`));
  }
  if (options.area) svg.append(drawn("polygon", { class: "area", points: `${left},${height} ${points.join(" ")} ${width},${height}` }));
  svg.append(drawn("polyline", { class: "curve", points: points.join(" ") }));
  svg.append(drawn("text", { x: left, y: height + 18 }, "0"));
  svg.append(drawn("text", { x: width, y: height + 18, "text-anchor": "end" }, `${span(timeline.seconds)} of work`));
  const cross = drawn("line", { class: "cross", y1: low, y2: height, visibility: "hidden" });
  const spot = drawn("circle", { class: "spot", r: 4.5, visibility: "hidden" });
  svg.append(cross, spot);
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * width;
    const place = Math.max(0, Math.min(values.length - 1, Math.round(((across - left) / (width - left)) * (values.length - 1))));
    for (const element of [cross, spot]) element.setAttribute("visibility", "visible");
    cross.setAttribute("x1", x(place));
    cross.setAttribute("x2", x(place));
    spot.setAttribute("cx", x(place));
    spot.setAttribute("cy", y(values[place]));
    tip(event, `${span((timeline.seconds * (place + (options.cumulative ? 0 : 0.5))) / Math.max(values.length - (options.cumulative ? 1 : 0), 1))}: ${options.at(values[place])}`);
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerleave", (event) => {
    for (const element of [cross, spot]) element.setAttribute("visibility", "hidden");
    tip(event, "");
  });
  return make("div", { className: "panel time" }, make("h2", { textContent: title }), svg);
}

function charts() {
  if (!timeline.images.length || !made) return;
  const bin = timeline.seconds / timeline.images.length;
  const sums = [0];
  for (const images of timeline.images) sums.push(sums[sums.length - 1] + images);
  const speeds = timeline.images.map((images) => images / bin);
  const short = (value) => (value >= 10_000 ? `${brief(value / 1000)}k` : whole.format(Math.round(value)));
  const progress = chart("Progress", sums, {
    area: true, cumulative: true, scale: short, told: `${whole.format(made)} pictures`, at: (value) => `${whole.format(value)} pictures`,
  });
  $("charts").append(progress);
  if (speeds.length > 2) {
    $("charts").append(chart("Images a second", speeds, { area: true, scale: brief, told: `${brief(made / timeline.seconds)} on average`, at: (value) => `${brief(value)} images/s` }));
  }
}

function failures() {
  if (!summary.reasons.length) return;
  const panel = make("div", { className: "panel" }, make("h2", { textContent: `${whole.format(summary.quarantined)} quarantined, and why` }));
  const most = Math.max(...summary.reasons.map(([, count]) => count));
  for (const [reason, count] of summary.reasons) {
    const meter = make("i", {});
    meter.style.width = `${(100 * count) / most}%`;
    const button = make("button", { type: "button", className: "reason", title: "Show them below" },
      make("b", { textContent: whole.format(count) }), make("span", { textContent: reason }), meter);
    button.addEventListener("click", () => { wanted.reason = reason; renew(); $("pictures").scrollIntoView(); });
    panel.append(button);
  }
  $("failures").append(panel);
  $("failures").hidden = false;
}

function distributions() {
  for (const { name, low, high, counts, median, mean, of } of summary.distributions) {
    const width = 280, height = 84, most = Math.max(...counts), each = width / counts.length;
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": `${name}: ${brief(low)} to ${brief(high)}, median ${brief(median)}` });
    counts.forEach((count, place) => {
      const from = low + ((high - low) * place) / counts.length, to = low + ((high - low) * (place + 1)) / counts.length;
      const tall = count ? Math.max((height * count) / most, 1.5) : 0;
      svg.append(drawn("rect", { class: "bar", x: place * each + 1, y: height - tall, width: each - 2, height: tall, rx: 1.5 }));
      const column = drawn("rect", { class: "column", x: place * each, y: 0, width: each, height });
      column.addEventListener("pointermove", (event) => tip(event, `${brief(from)} to ${brief(to)}: ${whole.format(count)}`));
      column.addEventListener("pointerleave", (event) => tip(event, ""));
      column.addEventListener("click", () => {
        wanted.ranges.set(name, [from, place + 1 === counts.length ? Infinity : to, `${name}: ${brief(from)} to ${brief(to)}`]);
        renew();
        $("pictures").scrollIntoView();
      });
      svg.append(column);
    });
    svg.append(drawn("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }));
    svg.append(drawn("text", { x: 0, y: height + 15 }, brief(low)), drawn("text", { x: width, y: height + 15, "text-anchor": "end" }, brief(high)));
    const soft = make("p", { className: "soft", textContent: `median ${brief(median)}, mean ${brief(mean)}, of ${whole.format(of)}` });
    $("distributions").append(make("div", { className: "panel" }, make("h2", { textContent: name }), svg, soft));
    $("distributions").hidden = false;
  }
}

// -- rows ---------------------------------------------------------------------------------------------------------

const total = summary.shown;
const columns = new Map(); // of ours: name → cells
const others = new Map(summary.others.map((name) => [name, new Array(total).fill("")])); // of the user's, and scores
const texts = new Array(total).fill(""); // what is searched
let ready = 0; // rows that have come

const cell = (name, row) => (columns.has(name) ? columns.get(name)[row] : "");

async function readRows() {
  let first = 0;
  for (const [name, count] of summary.rows) {
    let content;
    try {
      content = await unpacked(await data(name));
    } catch (error) {
      $("count").textContent = "data of this page is missing: its folder report/ belongs beside it";
      return;
    }
    for (const [kind, target] of [["columns", columns], ["others", others]]) {
      for (const [column, cells] of content[kind]) {
        if (!target.has(column)) target.set(column, new Array(total).fill(""));
        const into = target.get(column);
        for (let i = 0; i < count; i++) into[first + i] = cells.length === 1 ? cells[0] : cells[i];
      }
    }
    const searched = [columns.get("prompt"), columns.get("image_id"), columns.get("error"), ...others.values()];
    for (let row = first; row < first + count; row++) texts[row] = searched.map((cells) => cells[row]).join("\n").toLowerCase();
    first += count;
    ready = first;
    renew(true);
    await new Promise((resume) => setTimeout(resume));
  }
  fromAddress();
}

// -- what is wanted ------------------------------------------------------------------------------------------------

const wanted = { words: [], status: "", reason: "", values: new Map(), ranges: new Map(), order: "" };
let hits = null; // rows that are shown, in their order; null: all of them
const shown = () => (hits ? hits.length : total);
const rowAt = (place) => (hits ? hits[place] : place);

function renew(more = false) {
  const { words, status, reason, values, ranges, order } = wanted;
  if (!words.length && !status && !reason && !values.size && !ranges.size && !order) {
    hits = null;
  } else {
    const found = [];
    const sizes = (row) => `${cell("width", row)}×${cell("height", row)}`;
    const tests = [];
    for (const word of words) tests.push((row) => texts[row].includes(word));
    if (status) tests.push((row) => cell("status", row) === status);
    if (reason) tests.push((row) => cell("reason", row) === reason);
    for (const [name, value] of values) {
      const cells = others.get(name) || columns.get(name);
      tests.push(name === "size" && !others.has("size") ? (row) => sizes(row) === value : (row) => cells[row] === value);
    }
    for (const [name, [from, to]] of ranges) {
      const cells = others.get(name);
      tests.push((row) => cells[row] !== "" && Number(cells[row]) >= from && Number(cells[row]) < to);
    }
    for (let row = 0; row < ready; row++) if (tests.every((test) => test(row))) found.push(row);
    if (order) {
      const [sign, name] = [order[0] === "-" ? -1 : 1, order.slice(1)];
      const keys = others.get(name).map((value) => (value === "" ? -Infinity * sign : Number(value)));
      found.sort((one, other) => sign * (keys[one] - keys[other]) || one - other);
    }
    hits = found;
  }
  chips();
  const loading = ready < total ? `, ${whole.format(ready)} of ${whole.format(total)} read` : "";
  const cut = summary.shown < summary.committed + summary.quarantined ? `the first ${whole.format(summary.shown)}` : whole.format(total);
  $("count").textContent = hits ? `${whole.format(hits.length)} of ${cut}${loading}` : `${cut} images${loading}`;
  $("nothing").hidden = shown() > 0 || ready < total;
  if (!more) {
    current = 0;
    if ($("grid").getBoundingClientRect().top < 0) $("pictures").scrollIntoView();
  }
  clear();
  render();
}

function tools() {
  $("search").addEventListener("input", () => {
    wanted.words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    renew();
  });
  const choice = (label, entries, choose) => {
    const select = make("select", { title: label });
    select.setAttribute("aria-label", label);
    select.append(make("option", { value: "", textContent: label }));
    entries.forEach(([text, count], place) => {
      select.append(make("option", { value: place, textContent: count === null ? text : `${text || "(empty)"} · ${whole.format(count)}` }));
    });
    select.addEventListener("change", () => {
      select.classList.toggle("set", select.value !== "");
      choose(select.value === "" ? null : entries[Number(select.value)][0]);
      renew();
    });
    $("filters").append(select);
  };
  if (summary.quarantined && summary.committed) {
    choice("made or not", [["made", null], ["quarantined", null]], (value) => { wanted.status = { made: "committed", quarantined: "quarantined" }[value] || ""; });
  }
  for (const { name, values } of summary.filters) {
    choice(name, values, (value) => (value === null ? wanted.values.delete(name) : wanted.values.set(name, value)));
  }
  const orders = summary.distributions.flatMap(({ name }) => [[`highest ${name}`, `-${name}`], [`lowest ${name}`, `+${name}`]]);
  if (orders.length) {
    const known = new Map(orders);
    choice("as planned", orders.map(([text]) => [text, null]), (value) => { wanted.order = known.get(value) || ""; });
  }
}

function chips() {
  for (const chip of document.querySelectorAll(".chip")) chip.remove();
  const chip = (text, drop) => {
    const button = make("button", { type: "button", className: "chip", textContent: `${text} ×`, title: "Show all again" });
    button.addEventListener("click", () => { drop(); renew(); });
    $("filters").append(button);
  };
  if (wanted.reason) chip(wanted.reason, () => { wanted.reason = ""; });
  for (const [name, [, , text]] of wanted.ranges) chip(text, () => wanted.ranges.delete(name));
}

// -- thumbnails: packs of them come when they are looked at, and the oldest go --------------------------------------

const MOST_PACKS = 300;
const packs = new Map(); // number → thumbnails, or null while they are on their way
const ends = [];
summary.packs.reduce((end, [, count]) => { ends.push(end + count); return end + count; }, 0);

function packOf(row) {
  let low = 0, high = ends.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > row) high = middle; else low = middle + 1;
  }
  return low;
}

function thumbnail(row) {
  const pack = packOf(row), held = packs.get(pack);
  if (!held) return null;
  packs.delete(pack); // the latest looked at come last
  packs.set(pack, held);
  return held[row - (ends[pack] - summary.packs[pack][1])];
}

async function fetchPack(number) {
  if (packs.has(number)) return;
  packs.set(number, null);
  try {
    packs.set(number, await data(summary.packs[number][0]));
  } catch (error) {
    packs.set(number, []);
  }
  for (const old of packs.keys()) {
    if (packs.size <= MOST_PACKS) break;
    if (packs.get(old)) packs.delete(old);
  }
}

function source(row) {
  const small = thumbnail(row);
  return small ? `data:image/webp;base64,${small}` : "";
}

// -- the grid: only the cards that can be seen are there -----------------------------------------------------------

const GAP = 12, TEXT = 54;
const cards = new Map(); // place → li
let current = 0, across = 1, side = 160, settled = 0;

function clear() {
  for (const card of cards.values()) card.remove();
  cards.clear();
}

function render() {
  const grid = $("grid"), width = grid.clientWidth;
  across = Math.max(Math.floor((width + GAP) / ((innerWidth < 720 ? 140 : 168) + GAP)), 1);
  side = (width - GAP * (across - 1)) / across;
  const tall = side + TEXT + GAP, rows = Math.ceil(shown() / across);
  grid.style.height = `${Math.max(rows * tall - GAP, 0)}px`;
  const top = -grid.getBoundingClientRect().top;
  const first = Math.max(Math.floor(top / tall) - 1, 0) * across;
  const last = Math.min((Math.ceil((top + innerHeight) / tall) + 1) * across, shown());
  for (const [place, card] of cards) {
    if (place < first || place >= last) {
      if (card.contains(document.activeElement)) grid.focus({ preventScroll: true });
      card.remove();
      cards.delete(place);
    }
  }
  for (let place = first; place < last; place++) {
    let card = cards.get(place);
    if (!card) {
      card = cardOf(place);
      cards.set(place, card);
      grid.append(card);
    }
    card.style.width = `${side}px`;
    card.style.height = `${side + TEXT}px`;
    card.style.transform = `translate(${(place % across) * (side + GAP)}px, ${Math.floor(place / across) * tall}px)`;
  }
  clearTimeout(settled);
  settled = setTimeout(fill, 40);
}

function cardOf(place) {
  const row = rowAt(place), known = row < ready;
  const frame = make("div", { className: "frame" });
  const button = make("button", { type: "button", className: "card", tabIndex: place === current ? 0 : -1 }, frame, make("span", { textContent: known ? cell("prompt", row) : "" }));
  button.addEventListener("click", () => open(place));
  const item = make("li", {}, button);
  item.setAttribute("aria-setsize", shown());
  item.setAttribute("aria-posinset", place + 1);
  picture(frame, row);
  return item;
}

// A row's picture, its error, or nothing yet.
function picture(frame, row) {
  const there = source(row);
  if (there) {
    const image = make("img", { src: there, alt: cell("prompt", row), decoding: "async" });
    image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 32);
    frame.replaceChildren(image);
  } else if (row < ready && cell("status", row) === "quarantined") {
    frame.replaceChildren(make("p", { textContent: cell("error", row) }));
  } else if (packs.get(packOf(row))) {
    frame.replaceChildren(make("p", { textContent: "no picture that can be shown" }));
  } else {
    return false;
  }
  return true;
}

// Ask for what is looked at, once the scrolling has come to rest.
async function fill() {
  const missing = new Set();
  for (const place of cards.keys()) if (!packs.has(packOf(rowAt(place)))) missing.add(packOf(rowAt(place)));
  await Promise.all([...missing].map(async (pack) => {
    await fetchPack(pack);
    for (const [place, card] of cards) {
      const frame = card.querySelector(".frame");
      if (packOf(rowAt(place)) === pack && !frame.firstChild) picture(frame, rowAt(place));
    }
  }));
}

function focusOn(place) {
  current = Math.max(0, Math.min(place, shown() - 1));
  const grid = $("grid"), tall = side + TEXT + GAP, top = Math.floor(current / across) * tall;
  const at = grid.getBoundingClientRect().top + top, under = $("tools").offsetHeight + 6;
  if (at < under) scrollBy(0, at - under);
  else if (at + tall > innerHeight) scrollBy(0, at + tall - innerHeight);
  render();
  for (const [other, card] of cards) card.firstChild.tabIndex = other === current ? 0 : -1;
  const card = cards.get(current);
  if (card) card.firstChild.focus({ preventScroll: true });
}

// -- one picture ---------------------------------------------------------------------------------------------------

let opened = null;

// A word of a shell's, whatever it holds.
function quoted(word) {
  if (/^[A-Za-z0-9_@%+=:,./-]+$/.test(word)) return word;
  if (/^[\x20-\x7e\u00a1-\u1fff]*$/.test(word)) return `'${word.replaceAll("'", "'\\''")}'`;
  return null;
}

// The command that makes a picture again: by its id, or by its place where the id is nothing to paste in a shell.
function order(row) {
  const id = quoted(cell("image_id", row)), where = quoted(summary.output) || "OUTPUT";
  const which = id === null || id.startsWith("-") ? `${cell("shard", row)}/${cell("position", row)}` : id;
  return `sdbatch remake ${where} ${which} --to picture.png`.replace(/png$/, (cell("path", row).match(/\.(jpeg|webp)$/) || [0, "png"])[1]);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch (error) { // a page that came by plain HTTP has no clipboard
    getSelection().selectAllChildren($("order"));
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

async function open(place) {
  opened = current = Math.max(0, Math.min(place, shown() - 1));
  const row = rowAt(opened);
  if (row === undefined || row >= ready) return;
  const figure = make("figure", {}), told = make("div", { className: "told" });
  const move = (text, label, to) => {
    const button = make("button", { type: "button", className: "plain", textContent: text, disabled: to < 0 || to >= shown() });
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => open(to));
    return button;
  };
  const close = make("button", { type: "button", className: "plain", textContent: "Close" });
  close.addEventListener("click", () => $("picture").close());
  told.append(make("div", { className: "moves" }, move("←", "Previous", opened - 1), move("→", "Next", opened + 1),
    make("p", { className: "soft", textContent: `${whole.format(opened + 1)} of ${whole.format(shown())}` }), close));
  told.append(make("p", { className: "prompt", textContent: cell("prompt", row) || "(no prompt)" }));
  const list = make("dl", {});
  const fact = (name, value) => value !== "" && list.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  const failed = cell("status", row) === "quarantined";
  if (failed) fact("error", cell("error", row));
  fact("image_id", cell("image_id", row));
  fact("size", `${cell("width", row)}×${cell("height", row)}`);
  for (const name of ["template", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler", "strength", "init_image", "mask_image"]) fact(name, cell(name, row));
  if (cell("truncated", row) === "True") fact("truncated", "the prompt was longer than the model reads");
  fact("model", cell("model", row));
  for (const name of summary.others) fact(name, others.get(name)[row]);
  fact("path", cell("path", row));
  told.append(list);
  if (!failed) {
    const button = make("button", { type: "button", className: "plain", textContent: "Copy" });
    button.addEventListener("click", () => copy(order(row), button));
    told.append(make("h2", { textContent: "Make it again" }), make("div", { className: "order" }, make("code", { id: "order", textContent: order(row) }), button));
  }
  const dialog = $("picture");
  dialog.replaceChildren(make("div", { className: "sheet" }, figure, told));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  history.replaceState(null, "", `#${cell("shard", row)}/${cell("position", row)}`);
  await fetchPack(packOf(row));
  if (opened === null || rowAt(opened) !== row) return;
  picture(figure, row);
  const path = cell("path", row);
  if (/^data\/[\w./-]+$/.test(path) && !path.includes("#") && figure.querySelector("img")) {
    const large = make("img", { src: path, alt: cell("prompt", row) });
    large.onload = () => {
      large.classList.toggle("tiny", large.naturalWidth <= 32);
      if (figure.isConnected) figure.replaceChildren(large);
    };
  }
}

function fromAddress() {
  const found = /^#(\d+)\/(\d+)$/.exec(location.hash);
  if (!found) return;
  const [shards, positions] = [columns.get("shard"), columns.get("position")];
  for (let row = 0; row < total; row++) {
    if (shards[row] === found[1] && positions[row] === found[2]) return void open(hits ? hits.indexOf(row) : row);
  }
}

// -- keys, light and dark, and off ---------------------------------------------------------------------------------

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key } = event;
  if ($("picture").open) {
    if (key === "ArrowLeft" && opened > 0) open(opened - 1);
    else if (key === "ArrowRight" && opened + 1 < shown()) open(opened + 1);
    return;
  }
  if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) {
    if (event.target === $("search") && (key === "ArrowDown" || key === "Enter") && shown()) {
      focusOn(current);
      event.preventDefault();
    }
    return;
  }
  if (key === "/") {
    $("search").focus();
    $("search").select();
    event.preventDefault();
  } else if (event.target.closest("#grid")) {
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, ArrowUp: current - across, ArrowDown: current + across, Home: 0, End: shown() - 1 }[key];
    if (to === undefined) return;
    if (key === "ArrowUp" && to < 0) $("search").focus(); else focusOn(to);
    event.preventDefault();
  }
}

function theme() {
  const root = document.documentElement;
  try { // a page from a disk may have no storage
    const kept = localStorage.getItem("sdbatch-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch (error) { /* then it follows the system */ }
  $("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("sdbatch-theme", root.dataset.theme); } catch (error) { /* for this time only */ }
  });
}

theme();
figures();
charts();
failures();
distributions();
tools();
renew();
readRows();
document.addEventListener("keydown", keys);
document.addEventListener("scroll", () => requestAnimationFrame(render), { passive: true });
addEventListener("resize", () => { tip(null, ""); render(); });
$("grid").tabIndex = -1;
$("grid").addEventListener("focusin", (event) => {
  for (const [place, card] of cards) if (card.contains(event.target)) current = place;
});
$("picture").addEventListener("click", (event) => { if (event.target === $("picture")) $("picture").close(); });
$("picture").addEventListener("close", () => {
  opened = null;
  history.replaceState(null, "", location.pathname + location.search);
  focusOn(current);
});
