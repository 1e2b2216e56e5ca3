/* The page of `evercell serve`, after map.js, which has its map and its words for numbers. Text of files, genes, types and models is put in as text nodes only. */
"use strict";

const $ = (id) => document.getElementById(id);
const UNKNOWN = "Unknown";
const HEADERS = { "X-Evercell": "1" };

const state = {
  status: null, models: [], file: null, upload: null, job: null, result: null, map: null, labels: [], chosen: null,
  corrections: [], counts: {}, gene: null, taught: null,
};

/* ---- small things ---- */

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((one) => one !== null && one !== undefined));
  return node;
}

const megabytes = (bytes) => `${number.format(Math.max(0.1, Math.round(bytes / 104857.6) / 10))} MB`;

class Problem extends Error {
  constructor(said, status) {
    super(said.error || "the server does not answer");
    this.hint = said.hint || "";
    this.status = status;
  }
}

async function ask(path, { method = "GET", body } = {}) {
  let response;
  const headers = body === undefined ? HEADERS : { ...HEADERS, "Content-Type": "application/json" };
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Problem({ error: "the server does not answer", hint: "is `evercell serve` still running?" }, 0);
  }
  if (!response.ok) throw new Problem(await response.json().catch(() => ({})), response.status);
  return response.status === 204 || method === "HEAD" ? null : response.json();
}

function sayProblem(problem) {
  if (problem.status === 401) { showLogin(); return; }
  $("problem-text").textContent = capital(problem.message);
  $("problem-hint").textContent = problem.hint ? capital(problem.hint) : "";
  $("problem").hidden = false;
  $("problem").scrollIntoView({ block: "nearest" });
}
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const clearProblem = () => { $("problem").hidden = true; };

/* Run an action of the user: what goes wrong is said on the page. */
function act(action) {
  return async (event) => {
    if (event && event.type === "submit") event.preventDefault();
    clearProblem();
    try { await action(event); } catch (problem) { sayProblem(problem); }
  };
}

function show(...ids) {
  for (const id of ["login", "start", "running", "result"]) $(id).hidden = !ids.includes(id);
}

/* ---- access and models ---- */

async function begin() {
  state.status = await ask("api/status");
  $("version").textContent = state.status.version;
  if (state.status.token && !state.status.known) { showLogin(); return; }
  $("logout").hidden = !state.status.token;
  $("show-models").hidden = false;
  $("file").accept = state.status.suffixes.join(",");
  $("file-help").textContent =
    `.h5ad, 10x .h5, .loom or a table (.csv, .tsv), raw counts; up to ${megabytes(state.status.max_upload)}`;
  const hours = state.status.keep_seconds / 3600;
  $("retention").textContent = "The file goes to the server that you opened, nowhere else, and is removed there " +
    `${hours >= 1 ? plural(Math.round(hours), "hour") : plural(Math.round(60 * hours), "minute")} after the result.`;
  await loadModels();
  const known = location.hash.slice(1);
  if (known) {
    try { await follow(await ask(`api/jobs/${encodeURIComponent(known)}`)); return; } catch (problem) {
      location.hash = "";
      if (problem.status !== 404) throw problem;
    }
  }
  show("start");
}

function showLogin() {
  show("login");
  $("show-models").hidden = $("logout").hidden = true;
  $("token").focus();
}

async function loadModels(chosen = "auto") {
  state.models = await ask("api/models");
  const auto = modelCard("auto", "Choose for me", "Tries the models on some of the cells, and says why it chose one.");
  $("models").replaceChildren(auto, ...state.models.map((one) => modelCard(
    one.name, one.name,
    one.summary || `${one.species}, ${plural(one.types.length, "type")}`,
    `${plural(one.types.length, "type")} · ${plural(one.stages, "stage")}${one.packaged ? "" : " · of this server"}`,
  )));
  const wanted = [...document.getElementsByName("model")].find((one) => one.value === chosen);
  (wanted || document.getElementsByName("model")[0]).checked = true;
}

function modelCard(value, title, text, small) {
  const node = el("div", { class: "model" },
    el("label", {}, el("input", { type: "radio", name: "model", value }), el("span", {}, title)),
    el("p", {}, text), small ? el("p", {}, small) : null);
  if (value !== "auto") {
    node.append(el("button", {
      type: "button", class: "link", "aria-label": `Types and history of ${title}`, onclick: act(() => aboutModel(value)),
    }, "Types and history"));
  }
  return node;
}

async function aboutModel(name) {
  const model = await ask(`api/models/${encodeURIComponent(name)}`);
  $("model-title").textContent = model.name;
  $("model-body").replaceChildren(
    el("p", {}, model.summary || `${model.species}, ${number.format(model.genes)} genes`),
    el("h3", {}, plural(model.types.length, "type")),
    el("ul", { class: "chips" }, ...model.types.map((one) => el("li", {}, one))),
    el("h3", {}, "History"),
    ...model.history.map(stageCard));
  $("model-dialog").showModal();
}

function stageCard(stage) {
  const data = stage.data.map((one) => `${one.name} (${plural(one.cells, "cell")})`).join(", ");
  const gate = stage.gate && (stage.gate.holds
    ? `no old type fell on cells set aside${stage.gate.tries > 1 ? `, at try ${stage.gate.tries}` : ""}`
    : `old types fell: ${stage.gate.fallen.join(", ")}`);
  return el("div", { class: "stage" },
    el("p", { class: "strong" }, `Stage ${stage.stage}: ${stage.verb}${stage.strategy ? ` (${stage.strategy})` : ""}`),
    data ? el("p", {}, `Data: ${data}`) : null,
    stage.types_added.length ? el("p", {}, `New types: ${stage.types_added.join(", ")}`) : null,
    stage.accuracy === null ? null
      : el("p", {}, `${percent(stage.accuracy)} right on ${plural(stage.held_out || 0, "held-out cell")}`),
    gate ? el("p", {}, `Gate: ${gate}`) : null,
    el("p", { class: "soft" }, stage.hash.slice(0, 12)));
}

function aboutAllModels() {
  $("model-title").textContent = "Models";
  $("model-body").replaceChildren(...state.models.map((one) => el("p", {},
    el("button", { type: "button", class: "link", onclick: act(() => aboutModel(one.name)) }, one.name),
    ` ${one.summary || `${one.species}, ${plural(one.types.length, "type")}`}`)));
  $("model-dialog").showModal();
}

/* ---- upload and progress ---- */

function takeFile(file) {
  clearProblem();
  state.file = null;
  $("go").disabled = true;
  if (!file) return;
  $("file-name").textContent = `${file.name} (${megabytes(file.size)})`;
  if (!state.status.suffixes.some((one) => file.name.toLowerCase().endsWith(one))) {
    sayProblem(new Problem({
      error: `${file.name} is of no kind that is read: ${state.status.suffixes.join(", ")}`,
      hint: "of a 10x folder give filtered_feature_bc_matrix.h5",
    }));
  } else if (file.size > state.status.max_upload) {
    sayProblem(new Problem({
      error: `${file.name} has ${megabytes(file.size)}; this server takes ${megabytes(state.status.max_upload)}`,
      hint: "use `evercell annotate` for it, or start the server with a larger --max-upload",
    }));
  } else {
    state.file = file;
    $("go").disabled = false;
  }
}

function upload() {
  const query = new URLSearchParams({
    name: state.file.name, model: document.querySelector("input[name=model]:checked").value,
    reject: $("reject").value, majority: $("majority").checked,
  });
  $("running-title").textContent = state.file.name;
  setProgress($("step"), $("progress"), "Sending the file", 0, 0);
  show("running");
  return new Promise((resolve, reject) => {
    const request = state.upload = new XMLHttpRequest();
    request.open("POST", `api/jobs?${query}`);
    request.setRequestHeader("X-Evercell", "1");
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (event) =>
      setProgress($("step"), $("progress"), "Sending the file", event.loaded, event.total);
    request.onload = () => {
      let said = {};
      try { said = JSON.parse(request.responseText); } catch { /* not of this server */ }
      if (request.status === 202) resolve(said); else reject(new Problem(said, request.status));
    };
    request.onerror = () => reject(new Problem({ error: "the upload was broken off", hint: "try it again" }));
    request.onabort = () => resolve(null);
    request.send(state.file);
  });
}

function setProgress(words, bar, text, done, total) {
  if (words.textContent !== text) words.textContent = text;
  if (total > 0) { bar.max = total; bar.value = done; } else bar.removeAttribute("value");
}

const pause = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

/* Poll a job until it ends; `tell` is given words and figures. */
async function ended(job, tell) {
  let wait = 250;
  while (job.state === "queued" || job.state === "running") {
    const before = job.before ? `; ${plural(job.before, "job")} before it` : "";
    tell(job.state === "queued" ? `Waiting for its turn${before}` : capital(job.step || "starting"), job.done, job.total);
    await pause(wait);
    wait = Math.min(wait * 1.3, 1500);
    job = await ask(`api/jobs/${job.id}`);
  }
  return job;
}

async function annotate() {
  try {
    const job = await upload();
    state.upload = null;
    if (job === null) { show("start"); return; }
    await follow(job);
  } catch (problem) {
    show("start");
    throw problem;
  }
}

async function follow(job) {
  state.job = job;
  location.hash = job.id;
  $("running-title").textContent = job.name;
  show("running");
  job = await ended(job, (...what) => setProgress($("step"), $("progress"), ...what));
  if (job.state === "done") { await showResult(job); return; }
  state.job = null;
  location.hash = "";
  show("start");
  $("go").focus();
  if (job.state === "failed") throw new Problem(job.error);
}

async function cancel() {
  if (state.upload) { state.upload.abort(); return; }
  if (state.job) await ask(`api/jobs/${state.job.id}/cancel`, { method: "POST" });
}

/* ---- the result ---- */

async function showResult(job) {
  const result = state.result = await ask(`api/jobs/${job.id}/result`);
  state.job = job;
  Object.assign(state, { map: null, chosen: null, gene: null, taught: null });
  $("result-title").textContent = result.name;
  $("summary").textContent = result.summary.join(" ");
  $("chosen").hidden = !result.chosen;
  $("chosen").textContent = result.chosen ? `The model ${result.chosen.replaceAll("`", "")}.` : "";
  $("attention").hidden = !result.attention.length;
  $("attention").replaceChildren(...result.attention.map((one) =>
    el("li", {}, el("span", { class: "strong" }, one.finding), " ", one.mend)));
  $("notes-card").hidden = !result.notes.length;
  $("notes").replaceChildren(...result.notes.map((one) => el("li", {}, one.replaceAll("`", ""))));
  $("teach-name").value = `${result.model}-mine`.slice(0, 64);
  $("taught").hidden = $("teaching").hidden = true;
  drawComposition();
  const corrections = await ask(`api/jobs/${job.id}/corrections`);
  show("result");
  $("result-title").focus();
  $("map-body").hidden = !result.map.cells;
  $("map-note").textContent = result.map.note || (result.map.cells < result.cells
    ? `${number.format(result.map.cells)} of ${number.format(result.cells)} cells, sampled by type. Each point is a cell; near points look alike to the model.`
    : "Each point is a cell; near points look alike to the model.");
  if (result.map.cells) {
    const map = state.map = await ask(`api/jobs/${job.id}/map`);
    const ways = [["label", "Cell type"], result.majority && ["majority", "Majority vote"],
      ...map.samples.map((one, at) => [`sample-${at}`, one.column]),
      ["confidence", "Confidence"], ["unknown_score", "Unknown score"], ["gene", "Gene…"]];
    $("colour-by").replaceChildren(...ways.filter(Boolean).map(([value, text]) => el("option", { value }, text)));
    $("gene-row").hidden = true;
    $("gene").value = "";
    drawing.place(map.x, map.y);
  }
  takeCorrections(corrections);
}

/* Colour of a label: that of the result, or one that no other label has. */
function colourOf(name) {
  const { types, palette } = state.result;
  const known = types.find((one) => one.name === name);
  if (known) return known.colour;
  if (name === UNKNOWN) return "#9aa0a6";
  const added = Object.keys(state.counts).filter((one) => one !== UNKNOWN && !types.some((type) => type.name === one));
  const used = new Set(types.map((one) => one.colour));
  const free = palette.filter((one) => !used.has(one));
  return free[added.indexOf(name) % free.length] || palette[0];
}

function takeCorrections({ corrections, counts }) {
  Object.assign(state, { corrections, counts, chosen: null });
  if (state.map) {
    const place = new Map(state.map.row.map((row, i) => [row, i]));
    const labels = state.labels = state.map.type.map((code) => state.result.types[code].name);
    for (const one of corrections) {
      if (one.was) labels.forEach((label, i) => { if (label === one.was) labels[i] = one.label; });
      else for (const row of one.cells) if (place.has(row)) labels[place.get(row)] = one.label;
    }
  }
  drawTypes();
  drawCorrections();
  drawChosen();
  drawMap();
}

const NUMBERS = ["Cells", "Confidence", "By vote", "Now"];
const OPTIONAL = ["Share", "By vote", "Ontology"]; /* not on a phone */

function drawTypes() {
  const { result, counts, corrections } = state;
  const changed = corrections.length > 0;
  const names = [...result.types.map((one) => one.name), ...Object.keys(counts)
    .filter((name) => !result.types.some((one) => one.name === name))];
  const head = ["Type", "Cells", "Share", "Confidence", result.majority && "By vote", changed && "Now", "Ontology", ""];
  $("types-head").replaceChildren(el("tr", {}, ...head.filter((one) => one !== false).map((one) => el("th", {
    scope: "col",
    class: [NUMBERS.includes(one) && "number", OPTIONAL.includes(one) && "optional"].filter(Boolean).join(" "),
  }, one || el("span", { class: "hidden" }, "Relabel")))));
  $("types").replaceChildren(...names.map((name) => {
    const type = result.types.find((one) => one.name === name) || { cells: 0, share: 0, confidence: 0, ontology: "new", majority: 0 };
    const now = counts[name] || 0;
    return el("tr", {},
      el("td", { class: "name" }, swatch(colourOf(name)), name),
      el("td", { class: "number" }, number.format(type.cells)),
      el("td", { class: "share optional" }, percent(type.share),
        el("div", { class: "track" }, el("div", { class: "fill", style: { width: `${100 * type.share}%`, background: colourOf(name) } }))),
      el("td", { class: "number" }, type.cells ? type.confidence.toFixed(2) : "–"),
      result.majority ? el("td", { class: "number optional" }, number.format(type.majority)) : null,
      changed ? el("td", { class: "number" }, number.format(now)) : null,
      el("td", { class: "optional" }, type.ontology || ""),
      el("td", {}, el("button", {
        type: "button", class: "link", disabled: now === 0, "aria-label": `Relabel all cells that are ${name}`,
        onclick: () => choose({ was: name, text: `all ${plural(now, "cell")} that are ${name}` }),
      }, "Relabel")));
  }));
  const offered = [...new Set([...result.classes, ...Object.keys(counts), UNKNOWN])];
  $("type-list").replaceChildren(...offered.map((value) => el("option", { value })));
}

const swatch = (colour) => el("span", { class: "swatch", "aria-hidden": "true", style: { background: colour } });

function drawComposition() {
  const { samples, types } = state.result;
  $("composition-card").hidden = !samples.length;
  if (!samples.length) return;
  const [{ column, rows }] = samples;
  $("composition-title").textContent = `Composition by ${column}`;
  $("composition").replaceChildren(...rows.map((row) => {
    const total = row.cells.reduce((sum, one) => sum + one, 0);
    const words = types.map((type, i) => [type.name, row.cells[i] / total]).filter(([, share]) => share > 0)
      .map(([name, share]) => `${name} ${percent(share)}`).join(", ");
    return el("div", { class: "sample" },
      el("span", {}, row.name, " ", el("span", { class: "soft" }, `(${number.format(total)})`)),
      el("div", { class: "stack", role: "img", "aria-label": `${row.name}: ${words}` },
        ...types.map((type, i) => el("span", {
          title: `${type.name}: ${percent(row.cells[i] / total)}`,
          style: { width: `${(100 * row.cells[i]) / total}%`, background: type.colour },
        }))));
  }));
}

/* ---- the map ---- */

const drawing = cellMap({
  canvas: $("cells"), tip: $("tip"), legend: $("legend"), scale: $("scale"), tools: $("tools"), drag: "lasso", said: aboutCell,
  selected: (inside) => {
    const places = inside ? [...inside.keys()].filter((i) => inside[i]) : [];
    choose(places.length ? { places, text: describe(places) } : null);
  },
});

/* The cells coloured in one of the ways, as the map takes it. */
function layer(way) {
  const { map, result, gene } = state;
  if (way === "label") return ofLabels(way, state.labels);
  if (way === "majority") return ofLabels(way, map.majority.map((code) => result.types[code].name));
  if (way === "gene") {
    const values = new Array(map.x.length).fill(0), high = gene.values.reduce((most, one) => Math.max(most, one), 0);
    gene.cells.forEach((cell, i) => { values[cell] = gene.values[i]; });
    return { id: way, gene: true, low: 0, high, steps: steps(values, 0, high) };
  }
  if (way.startsWith("sample-")) return { id: way, named: false, ...map.samples[Number(way.slice(7))] };
  const there = map[way].filter((one) => one !== null);
  const [low, high] = way === "confidence" ? [0, 1]
    : there.reduce((ends, one) => [Math.min(ends[0], one), Math.max(ends[1], one)], [Infinity, -Infinity]);
  return { id: way, low: there.length ? low : 0, high: there.length ? high : 0, steps: steps(map[way], low, high) };
}

function ofLabels(id, labels) {
  const levels = [...new Set(labels)], codes = new Map(levels.map((name, code) => [name, code]));
  return { id, named: true, levels, colours: levels.map(colourOf), codes: Uint16Array.from(labels, (name) => codes.get(name)) };
}

/* Numbers as steps 0 to 254 of the way from low to high; 255 stands for none. */
const steps = (values, low, high) => Uint8Array.from(values, (one) => (one === null ? 255
  : one > low ? Math.max(1, Math.round(254 * Math.min(1, (one - low) / (high - low)))) : 0));

function drawMap() {
  if (!state.map) return;
  const way = $("colour-by").value;
  if (way === "gene" && !state.gene) return; /* until one is named, the colours stay */
  drawing.colour(layer(way));
}

function aboutCell(i) {
  const { map, gene, labels } = state, way = $("colour-by").value;
  const lines = [labels[i], map.cell[i], `confidence ${map.confidence[i].toFixed(2)}`];
  if (way === "unknown_score") lines.push(`unknown score ${map.unknown_score[i] ?? "–"}`);
  if (way === "majority") lines.push(`by vote ${state.result.types[map.majority[i]].name}`);
  if (way.startsWith("sample-")) { const sample = map.samples[Number(way.slice(7))]; lines.push(`${sample.column} ${sample.levels[sample.codes[i]]}`); }
  if (way === "gene" && gene) lines.push(`${gene.symbol} ${(gene.values[gene.cells.indexOf(i)] ?? 0).toFixed(2)}`);
  return lines.join("\n");
}

function describe(places) {
  const found = new Map();
  for (const i of places) found.set(state.labels[i], (found.get(state.labels[i]) ?? 0) + 1);
  const most = [...found].sort((a, b) => b[1] - a[1]);
  const words = most.slice(0, 3).map(([name, n]) => `${number.format(n)} ${name}`).join(", ");
  return `${plural(places.length, "cell")} (${words}${most.length > 3 ? " and others" : ""})`;
}

function colourBy() {
  const gene = $("colour-by").value === "gene";
  $("gene-row").hidden = !gene;
  if (gene && !state.gene) $("gene").focus();
  drawMap();
}

let asked = 0;
async function findGenes() {
  const mine = ++asked;
  await pause(150);
  const start = $("gene").value.trim();
  if (mine !== asked || !start) return;
  const names = await ask(`api/jobs/${state.job.id}/genes?${new URLSearchParams({ find: start })}`);
  if (mine === asked) $("gene-list").replaceChildren(...names.map((value) => el("option", { value })));
  if (names.some((one) => one.toLowerCase() === start.toLowerCase())) await showGene();
}

async function showGene() {
  const name = $("gene").value.trim();
  if (!name) return;
  state.gene = await ask(`api/jobs/${state.job.id}/gene?${new URLSearchParams({ name })}`);
  drawMap();
}

/* ---- corrections ---- */

function choose(chosen) {
  state.chosen = chosen;
  drawChosen();
  if (chosen) $("new-label").focus({ preventScroll: true });
}

function drawChosen() {
  $("relabel").hidden = !state.chosen;
  $("selected").textContent = state.chosen ? `Selected: ${state.chosen.text}` : "";
  if (!state.chosen) $("new-label").value = "";
  if (state.map) drawing.select(state.chosen && chosenCells(state.chosen));
}

/* 1 for each cell of the map that is chosen. */
function chosenCells({ places, was }) {
  if (was) return Uint8Array.from(state.labels, (label) => Number(label === was));
  const found = new Uint8Array(state.labels.length);
  for (const i of places) found[i] = 1;
  return found;
}

async function relabel() {
  const { places, was } = state.chosen;
  const cells = places ? places.map((i) => state.map.row[i]) : [];
  const body = { label: $("new-label").value, cells, was: was || "" };
  takeCorrections(await ask(`api/jobs/${state.job.id}/corrections`, { method: "POST", body }));
}

function drawCorrections() {
  const any = state.corrections.length > 0;
  $("corrections-none").hidden = any;
  $("undo").hidden = $("teach").hidden = !any;
  $("corrections").replaceChildren(...state.corrections.map((one) => el("li", {},
    `${plural(one.n_cells, "cell")}${one.was ? ` that were ${one.was}` : ""} → `, el("span", { class: "strong" }, one.label))));
}

async function undo() {
  takeCorrections(await ask(`api/jobs/${state.job.id}/corrections/last`, { method: "DELETE" }));
  $(state.corrections.length ? "undo" : "result-title").focus();
}

/* ---- files and teaching ---- */

async function download(button) {
  const path = `api/jobs/${state.job.id}/files/${button.dataset.file}`;
  $("preparing").textContent = "Preparing the file…";
  button.disabled = true;
  try {
    await ask(path, { method: "HEAD" });
    const link = el("a", { href: path, download: true });
    document.body.append(link);
    link.click();
    link.remove();
    $("preparing").textContent = "";
  } catch (problem) {
    $("preparing").textContent = "";
    await ask(`api/jobs/${state.job.id}`); /* an answer to HEAD has no words; is the job still there? */
    throw new Problem({ error: "the file could not be made", hint: problem.hint || "try it again" }, problem.status);
  } finally { button.disabled = false; }
}

async function teach() {
  const body = { name: $("teach-name").value, confident: $("teach-confident").checked, strategy: $("teach-strategy").value };
  let job = await ask(`api/jobs/${state.job.id}/teach`, { method: "POST", body });
  state.taught = job;
  $("taught").hidden = true;
  $("teach").hidden = true;
  $("teaching").hidden = false;
  try {
    job = await ended(job, (...what) => setProgress($("teach-step"), $("teach-progress"), ...what));
    if (job.state === "failed") {
      $("taught").replaceChildren(el("p", { class: "strong" }, "Nothing was kept."),
        el("p", {}, capital(job.error.error)), el("p", { class: "soft" }, job.error.hint ? capital(job.error.hint) : ""));
      $("taught").hidden = false;
    } else if (job.state === "done") drawTaught(await ask(`api/jobs/${job.id}/result`));
  } finally {
    state.taught = null;
    $("teaching").hidden = true;
    $("teach").hidden = !state.corrections.length;
  }
}

function drawTaught(facts) {
  const learnt = facts.types_added.length ? `It learnt ${facts.types_added.join(", ")}.` : "It has the types of the old one.";
  const safer = facts.strategy === facts.asked ? "" : ` With “${facts.asked}” old types fell; it was made with “${facts.strategy}”.`;
  const gate = facts.sealed.length ? `The gate let it through: no old type fell on cells set aside.${safer}`
    : "The old model has no cells set aside, so nothing could be checked.";
  const rows = facts.sealed.map((one) => el("tr", {}, el("td", {}, one.type),
    el("td", { class: "number" }, number.format(one.cells)), el("td", { class: "number" }, percent(one.before)),
    el("td", { class: "number" }, percent(one.after))));
  const head = ["Old type", "Cells", "Before", "After"].map((one, i) => el("th", { scope: "col", class: i ? "number" : "" }, one));
  $("taught").replaceChildren(
    el("p", { class: "good" }, `${facts.model} is made, with ${plural(facts.stages, "stage")}.`),
    el("p", {}, `${learnt} It was given ${plural(facts.corrected, "corrected cell")} and ${plural(facts.confident, "cell")} that it was sure of.`),
    el("p", {}, gate),
    rows.length ? el("details", {}, el("summary", {}, "Right labels on cells set aside"),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Old types before and after" },
        el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)))) : null,
    el("div", { class: "row" },
      el("button", { type: "button", onclick: act(() => aboutModel(facts.model)) }, "Its history"),
      el("button", { type: "button", class: "primary", onclick: act(() => useModel(facts.model)) }, "Use it for the next file")));
  $("taught").hidden = false;
  loadModels().catch(sayProblem);
}

async function useModel(name) {
  await loadModels(name);
  again();
}

function again() {
  location.hash = "";
  state.job = null;
  show("start");
  $("file").focus();
}

/* ---- wiring ---- */

$("login-form").addEventListener("submit", act(async () => {
  await ask("api/login", { method: "POST", body: { token: $("token").value } }).catch((problem) => {
    throw new Problem({ error: problem.message, hint: problem.hint }); /* said here, not asked for again */
  });
  $("token").value = "";
  await begin();
}));
$("logout").addEventListener("click", act(async () => { await ask("api/logout", { method: "POST" }); location.hash = ""; location.reload(); }));
$("show-models").addEventListener("click", act(async () => { await loadModels(document.querySelector("input[name=model]:checked").value); aboutAllModels(); }));
$("model-close").addEventListener("click", () => $("model-dialog").close());
$("problem-close").addEventListener("click", clearProblem);
$("file").addEventListener("change", () => takeFile($("file").files[0]));
for (const kind of ["dragenter", "dragover"]) $("drop").addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const kind of ["dragleave", "drop"]) $("drop").addEventListener(kind, () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => { event.preventDefault(); takeFile(event.dataTransfer.files[0]); });
/* A file dropped beside the field must not replace the page. */
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
$("ask").addEventListener("submit", act(annotate));
$("cancel").addEventListener("click", act(cancel));
$("another").addEventListener("click", act(again));
$("forget").addEventListener("click", act(async () => { await ask(`api/jobs/${state.job.id}`, { method: "DELETE" }); again(); }));
$("colour-by").addEventListener("change", act(colourBy));
$("gene").addEventListener("input", act(findGenes));
$("gene").addEventListener("change", act(showGene));
$("relabel").addEventListener("submit", act(relabel));
$("clear-selection").addEventListener("click", () => choose(null));
$("undo").addEventListener("click", act(undo));
for (const button of document.querySelectorAll("[data-file]")) button.addEventListener("click", act(() => download(button)));
$("teach").addEventListener("submit", act(teach));
$("teach-cancel").addEventListener("click", act(async () => { if (state.taught) await ask(`api/jobs/${state.taught.id}/cancel`, { method: "POST" }); }));
act(begin)();
