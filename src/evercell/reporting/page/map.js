/* The map of the cells. Points are written into the pixels of a canvas: 100,000 of them in some hundredths of a second,
   with or without a GPU. Text of the data is put in as text only. */
"use strict";
{
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("map-data").textContent);
  const canvas = $("cells"), context = canvas.getContext("2d"), tip = $("tip");
  const format = new Intl.NumberFormat("en");
  const n = data.cells, MISSING = 255, RAMP_STEPS = 255;
  const plural = (count, word) => `${format.format(count)} ${word}${count === 1 ? "" : "s"}`;
  const percent = (share) => (share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(1)}%`);

  /* ---- data ---- */

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const numbers = async (text) => {
    const bytes = await unpack(text);
    return bytes.length === n ? bytes : new Uint16Array(bytes.buffer);
  };
  const columns = new Map(data.columns.map((one) => [one.id, one]));
  const scores = new Map(data.scores.map((one) => [one.id, one]));
  const genes = new Map((data.genes ?? []).map((one) => [one.name.toUpperCase(), one]));

  const state = { by: data.columns[0].id, gene: null, drag: "", selected: null, hidden: new Map(), x: 0, y: 0, scale: 1, path: null };
  let px, py, pixels, image, order = null, shades, background, waiting = false;
  let lasso = null, ready = false;

  /* ---- colours ---- */

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const word = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
  const mixed = (one, other, share) => one.map((value, at) => Math.round(value + (other[at] - value) * share));
  const dark = () => !printing && matchMedia("(prefers-color-scheme: dark)").matches;
  const SCORE = ["#7b4fb3", "#4a78b5", "#2b9a98", "#55b866", "#c3cf3a"].map(rgb);
  let printing = false;
  const along = (stops) => Array.from({ length: RAMP_STEPS }, (_, step) => {
    const place = step / (RAMP_STEPS - 1) * (stops.length - 1), first = Math.min(Math.floor(place), stops.length - 2);
    return mixed(stops[first], stops[first + 1], place - first);
  });
  const ramp = () => {
    if (state.by !== "gene") return along(SCORE);
    const none = dark() ? "#39434f" : "#d5dbe2"; // a cell without the gene stays to be seen
    return along((dark() ? [none, "#4d6fa8", "#7fb2f0", "#f3f6ff"] : [none, "#8fb3dc", "#2f6db0", "#10284f"]).map(rgb));
  };
  const shown = () => columns.get(state.by) ?? null;

  /** The column that colours the cells, as steps of shades. */
  const source = async () => {
    const column = shown();
    if (column) return (column.values ??= await numbers(column.codes));
    const score = state.by === "gene" ? state.gene : scores.get(state.by);
    return score ? (score.steps ??= await unpack(score.values)) : null;
  };

  const recolour = async () => {
    const values = await source(), column = shown();
    background = rgb(printing ? "#ffffff" : css("--surface"));
    const grey = mixed(background, [128, 128, 128], 0.4);
    const colours = column ? [...column.colours.map(rgb), grey] : [...ramp(), grey];
    const faded = colours.map((one) => word(mixed(background, one, 0.16)));
    shades = { values, words: new Uint32Array(colours.map(word)), faded: new Uint32Array(faded), gone: hiddenOf(column) };
    order = column || !values ? null : sorted(values);
    legend(column);
    draw();
  };
  const hiddenOf = (column) => (column ? state.hidden.get(column.id) ?? new Set() : new Set());

  /** Cells by rising step, missing ones first, so that high values lie on top. */
  const sorted = (values) => {
    const starts = new Uint32Array(257), places = new Uint32Array(n);
    const rank = (value) => (value === MISSING ? 0 : value + 1);
    for (let i = 0; i < n; i++) starts[rank(values[i]) + 1]++;
    for (let step = 1; step < 257; step++) starts[step] += starts[step - 1];
    for (let i = 0; i < n; i++) places[starts[rank(values[i])]++] = i;
    return places;
  };

  /* ---- drawing ---- */

  const measure = () => {
    const ratio = printing ? 2 : Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(Math.round(canvas.clientWidth * ratio), 2), height = Math.max(Math.round(canvas.clientHeight * ratio), 2);
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; image = null; }
    image ??= context.createImageData(width, height);
    pixels = new Uint32Array(image.data.buffer);
    return ratio;
  };
  let extent = [1, 1];
  const view = () => {
    const ratio = canvas.width / Math.max(canvas.clientWidth, 1), pad = 26 * ratio;
    const fit = Math.min((canvas.width - 2 * pad) / extent[0], (canvas.height - 2 * pad) / extent[1]) * state.scale;
    return { fit, left: canvas.width / 2 - (extent[0] / 2 + state.x) * fit, top: canvas.height / 2 + (extent[1] / 2 + state.y) * fit };
  };

  /** Offsets and shares of the pixels of a round point. */
  const stamp = (radius) => {
    const found = [], reach = Math.ceil(radius);
    for (let dy = -reach; dy <= reach; dy++) for (let dx = -reach; dx <= reach; dx++) {
      const share = Math.min(Math.max(radius + 0.5 - Math.hypot(dx, dy), 0), 1);
      if (share > 0.08) found.push(dx, dy, share);
    }
    return found;
  };

  const paint = () => {
    waiting = false;
    if (!shades?.values && state.by !== "gene") return;
    const ratio = measure(), { width, height } = canvas;
    pixels.fill(word(background));
    const { fit, left, top } = view();
    const size = (n > 50000 ? 1.1 : n > 20000 ? 1.5 : n > 5000 ? 2.1 : n > 1000 ? 2.8 : 3.6) * Math.min(Math.sqrt(state.scale), 2.5) * ratio * Math.min(1, Math.max(0.6, width / ratio / 800));
    const dots = stamp(size), reach = Math.ceil(size) + 1;
    const one = (i, words) => {
      const x = Math.round(left + px[i] * fit), y = Math.round(top - py[i] * fit);
      if (x < reach || y < reach || x >= width - reach || y >= height - reach) return;
      const colour = words[shades.values ? (shades.values[i] === MISSING && order ? RAMP_STEPS : shades.values[i]) : 0];
      const middle = y * width + x;
      for (let at = 0; at < dots.length; at += 3) {
        const place = middle + dots[at + 1] * width + dots[at], share = dots[at + 2];
        if (share === 1) { pixels[place] = colour; continue; }
        const under = pixels[place];
        const r = (under & 255) + ((colour & 255) - (under & 255)) * share;
        const g = (under >> 8 & 255) + ((colour >> 8 & 255) - (under >> 8 & 255)) * share;
        const b = (under >> 16 & 255) + ((colour >> 16 & 255) - (under >> 16 & 255)) * share;
        pixels[place] = 255 << 24 | b << 16 | g << 8 | r;
      }
    };
    const { gone } = shades, picked = state.selected, masked = gone.size > 0;
    if (picked) for (let k = 0; k < n; k++) { const i = order ? order[k] : k; if (!picked[i] && !(masked && gone.has(shades.values[i]))) one(i, shades.faded); }
    for (let k = 0; k < n; k++) {
      const i = order ? order[k] : k;
      if ((!picked || picked[i]) && !(masked && gone.has(shades.values[i]))) one(i, shades.words);
    }
    context.putImageData(image, 0, 0);
    names(ratio, { fit, left, top });
    if (lasso) outline(lasso, ratio);
  };
  const draw = () => { if (!waiting) { waiting = true; requestAnimationFrame(paint); } };

  /** Names of the labels where most of their cells are; a name that would cover another is left to the legend. */
  const names = (ratio, { fit, left, top }) => {
    const column = shown();
    if (!column || column.id.startsWith("sample")) return;
    column.centres ??= centres(column.values, column.levels.length);
    const taken = [];
    context.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    context.textAlign = "center"; context.textBaseline = "middle"; context.lineJoin = "round";
    const total = column.centres.map((one, code) => [one, code]).filter(([one]) => one).sort(([one], [other]) => other[2] - one[2]);
    for (const [[cx, cy, cells], code] of total) {
      const full = column.levels[code], name = full.length > 28 ? `${full.slice(0, 27)}…` : full;
      if (full === "Unknown" || shades.gone.has(code)) continue;
      const half = context.measureText(name).width / 2 + 3 * ratio;
      if (2 * half > canvas.width) continue;
      const x = Math.min(Math.max(left + cx * fit, half), canvas.width - half), y = top - cy * fit - (cells < 0.02 * n ? 13 * ratio : 0);
      if (y < 9 * ratio || y > canvas.height - 9 * ratio) continue;
      if (left + cx * fit < 0 || left + cx * fit > canvas.width) continue;
      const box = [x - half, x + half, y - 9 * ratio, y + 9 * ratio];
      if (taken.some((other) => box[0] < other[1] && other[0] < box[1] && box[2] < other[3] && other[2] < box[3])) continue;
      taken.push(box);
      context.strokeStyle = `rgb(${background.join(" ")} / .85)`; context.lineWidth = 4 * ratio; context.strokeText(name, x, y);
      context.fillStyle = printing ? "#1c2430" : css("--ink"); context.fillText(name, x, y);
    }
  };
  /** Of each label the median of its cells in the fullest of 12 x 12 fields: on its largest island, never in a gap. */
  const centres = (codes, levels) => {
    const fields = Array.from({ length: levels }, () => new Map());
    for (let i = 0; i < n; i++) {
      if (codes[i] >= levels) continue;
      const field = Math.floor(px[i] / extent[0] * 11.99) * 12 + Math.floor(py[i] / extent[1] * 11.99), found = fields[codes[i]];
      if (!found.has(field)) found.set(field, []);
      found.get(field).push(i);
    }
    return fields.map((found) => {
      if (!found.size) return null;
      const fullest = [...found.values()].reduce((best, one) => (one.length > best.length ? one : best));
      const middle = (of) => Float32Array.from(fullest, (i) => of[i]).sort()[fullest.length >> 1];
      return [middle(px), middle(py), [...found.values()].reduce((sum, one) => sum + one.length, 0)];
    });
  };
  const outline = (path, ratio) => {
    context.beginPath();
    path.forEach(([x, y], at) => (at ? context.lineTo(x * ratio, y * ratio) : context.moveTo(x * ratio, y * ratio)));
    context.closePath();
    context.strokeStyle = css("--ink"); context.lineWidth = 1.5 * ratio; context.setLineDash([6 * ratio, 4 * ratio]);
    context.stroke(); context.setLineDash([]);
  };

  /* ---- legend ---- */

  const node = (tag, text, properties = {}) => Object.assign(document.createElement(tag), { textContent: text, ...properties });
  const legend = (column) => {
    $("legend").hidden = !column; $("scale").hidden = Boolean(column) || !shades.values;
    if (!column) {
      const score = state.by === "gene" ? state.gene : scores.get(state.by), [low, bar, high] = $("scale").children;
      if (!score) return;
      low.textContent = (score.low ?? 0).toFixed(2); high.textContent = score.high.toFixed(2);
      bar.style.background = `linear-gradient(90deg, ${ramp().filter((_, at) => at % 16 === 0).map((one) => `rgb(${one.join(" ")})`).join(", ")})`;
      return;
    }
    const sizes = new Uint32Array(column.levels.length + 1), gone = hiddenOf(column);
    for (let i = 0; i < n; i++) sizes[column.values[i]]++;
    const codes = column.levels.map((_, code) => code).sort((a, b) => (column.levels[a] === "Unknown") - (column.levels[b] === "Unknown") || sizes[b] - sizes[a]);
    $("legend").replaceChildren(...codes.map((code) => {
      const button = node("button", "", { type: "button", title: "Click: hide or show. Double click: show this one alone." });
      button.setAttribute("aria-pressed", String(!gone.has(code)));
      const dot = node("i", "", { className: "dot" });
      dot.style.background = column.colours[code];
      button.append(dot, `${column.levels[code]} `, node("small", format.format(sizes[code])));
      const change = (next) => { state.hidden.set(column.id, next); shades.gone = next; keepFocus(code, () => legend(column)); draw(); };
      button.addEventListener("click", () => { const next = new Set(hiddenOf(column)); next.delete(code) || next.add(code); change(next); });
      button.addEventListener("dblclick", () => {
        const others = codes.filter((one) => one !== code), now = hiddenOf(column);
        change(new Set(others.every((one) => now.has(one)) ? [] : others));
      });
      button.dataset.code = code;
      return button;
    }).map((button) => { const item = document.createElement("li"); item.append(button); return item; }));
  };
  const keepFocus = (code, action) => { action(); $("legend").querySelector(`[data-code="${code}"]`)?.focus(); };

  /* ---- what the reader does ---- */

  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const nearest = ([x, y]) => {
    const ratio = canvas.width / canvas.clientWidth, { fit, left, top } = view();
    const mx = (x * ratio - left) / fit, my = (top - y * ratio) / fit;
    let best = -1, least = (9 * ratio / fit) ** 2;
    for (let i = 0; i < n; i++) {
      const dx = px[i] - mx, dy = py[i] - my, far = dx * dx + dy * dy;
      if (far < least && !(shades.gone.size && shades.gone.has(shades.values[i]))) { least = far; best = i; }
    }
    return best;
  };
  let cellNames = null;
  const nameOf = (i) => cellNames?.[i] ?? "";
  const said = (i) => {
    const lines = [nameOf(i)];
    for (const column of columns.values()) if (column.values && column.values[i] < column.levels.length) lines.push(`${column.title}: ${column.levels[column.values[i]]}`);
    for (const score of scores.values()) if (score.steps && score.steps[i] !== MISSING) lines.push(`${score.title}: ${(score.low + (score.high - score.low) * score.steps[i] / 254).toFixed(2)}`);
    if (state.gene?.steps && state.by === "gene") lines.push(`${state.gene.name}: ${(state.gene.high * state.gene.steps[i] / 254).toFixed(2)}`);
    return lines.filter(Boolean).join("\n");
  };
  const hover = (point) => {
    const found = ready && !state.path ? nearest(point) : -1;
    tip.hidden = found < 0;
    if (found < 0) return;
    tip.textContent = said(found);
    const right = point[0] > canvas.clientWidth - 230;
    tip.style.left = right ? "auto" : `${point[0] + 14}px`;
    tip.style.right = right ? `${canvas.clientWidth - point[0] + 14}px` : "auto";
    tip.style.top = `${Math.min(point[1] + 12, canvas.clientHeight - 60)}px`;
  };
  const zoom = (factor, [x, y] = [canvas.clientWidth / 2, canvas.clientHeight / 2]) => {
    const ratio = canvas.width / canvas.clientWidth, before = view();
    const mx = (x * ratio - before.left) / before.fit, my = (before.top - y * ratio) / before.fit;
    state.scale = Math.min(Math.max(state.scale * factor, 0.5), 80);
    const { fit } = view();
    state.x = mx - extent[0] / 2 - (x * ratio - canvas.width / 2) / fit;
    state.y = my - extent[1] / 2 + (y * ratio - canvas.height / 2) / fit;
    draw();
  };
  const move = (dx, dy) => { const ratio = canvas.width / canvas.clientWidth, { fit } = view(); state.x -= dx * ratio / fit; state.y += dy * ratio / fit; draw(); };
  const whole = () => { Object.assign(state, { x: 0, y: 0, scale: 1 }); draw(); };
  const setDrag = (name) => {
    state.drag = name;
    document.querySelectorAll("[data-drag]").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.drag === name)));
    canvas.style.touchAction = name ? "none" : "auto";
    canvas.style.cursor = name === "lasso" ? "crosshair" : name ? "grab" : "default";
  };
  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (!ready || !state.drag || event.button) return;
    canvas.setPointerCapture(event.pointerId);
    last = at(event);
    if (state.drag === "lasso") lasso = state.path = [last];
    tip.hidden = true;
  });
  canvas.addEventListener("pointermove", (event) => {
    const point = at(event);
    if (!last) { hover(point); return; }
    if (state.path) { state.path.push(point); draw(); } else { move(point[0] - last[0], point[1] - last[1]); last = point; }
  });
  const end = () => {
    const path = state.path;
    last = null; state.path = lasso = null;
    if (path) select(path.length > 3 ? inside(path) : null);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("click", (event) => { if (!state.drag) hover(at(event)); });
  canvas.addEventListener("wheel", (event) => {
    // The page scrolls past the map; over a map that was clicked, or with Ctrl, the wheel zooms.
    if (document.activeElement !== canvas && !event.ctrlKey) return;
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 300), at(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const keys = {
      ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
      "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: whole, Escape: () => select(null),
    };
    if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); keys[event.key](); }
  });

  const inside = (path) => {
    const ratio = canvas.width / canvas.clientWidth, { fit, left, top } = view();
    const xs = path.map(([x]) => (x * ratio - left) / fit), ys = path.map(([, y]) => (top - y * ratio) / fit);
    const [low, high] = [Math.min(...xs), Math.max(...xs)], found = new Uint8Array(n), m = xs.length;
    for (let i = 0; i < n; i++) {
      const x = px[i], y = py[i];
      if (x < low || x > high || (shades.gone.size && shades.gone.has(shades.values[i]))) continue;
      for (let a = 0, b = m - 1; a < m; b = a++) if ((ys[a] > y) !== (ys[b] > y) && x < (xs[b] - xs[a]) * (y - ys[a]) / (ys[b] - ys[a]) + xs[a]) found[i] ^= 1;
    }
    return found;
  };
  const select = async (found) => {
    const box = $("selection"), cells = found ? found.reduce((sum, one) => sum + one, 0) : 0;
    state.selected = cells ? found : null;
    box.hidden = !cells;
    draw();
    if (!cells) return;
    const labels = columns.get("label"), sizes = new Map();
    for (let i = 0; i < n; i++) if (found[i]) sizes.set(labels.values[i], (sizes.get(labels.values[i]) ?? 0) + 1);
    const parts = [...sizes].sort((one, other) => other[1] - one[1]);
    const words = parts.slice(0, 6).map(([code, size]) => `${labels.levels[code]} ${format.format(size)} (${percent(size / cells)})`);
    const lines = [node("p", `${plural(cells, "cell")} selected: ${words.join(", ")}${parts.length > 6 ? ` and ${parts.length - 6} more labels` : ""}.`)];
    const raised = node("p", "");
    lines.push(raised);
    const actions = [["Clear", () => select(null)]];
    if (cellNames) {
      const table = () => ["cell,label", ...cellNames.flatMap((name, i) => (found[i] ? [[name, labels.levels[labels.values[i]]].map(quoted).join(",")] : []))].join("\n");
      actions.unshift(["Save names as .csv", () => save(new Blob([table()], { type: "text/csv" }), "selected-cells.csv")]);
    }
    box.replaceChildren(...lines, ...actions.map(([text, action]) => {
      const button = node("button", text, { type: "button", className: "button" });
      button.addEventListener("click", action);
      return button;
    }));
    if (data.genes && cells < n) raised.textContent = await raisedGenes(found, cells);
  };
  /** A name as a spreadsheet takes it: quoted, and never as a formula. */
  const quoted = (text) => `"${(/^[=+\-@\t]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  const raisedGenes = async (found, cells) => {
    const ranked = [];
    for (const gene of genes.values()) {
      gene.steps ??= await unpack(gene.values);
      let here = 0, elsewhere = 0, there = 0;
      for (let i = 0; i < n; i++) { const value = gene.steps[i]; if (found[i]) { here += value; there += value > 0; } else elsewhere += value; }
      ranked.push([gene.name, gene.high / 254 * (here / cells - elsewhere / (n - cells)), there / cells]);
    }
    ranked.sort((one, other) => other[1] - one[1]);
    const best = ranked.filter(([, more]) => more > 0.1).slice(0, 8).map(([name, more, share]) => `${name} (+${more.toFixed(1)}, in ${percent(share)})`);
    return best.length ? `Of the genes in this page higher here than in the other cells: ${best.join(", ")}.` : "No gene in this page is higher here than in the other cells.";
  };
  const save = (blob, name) => {
    const link = node("a", "", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  $("colour-by").addEventListener("change", async (event) => {
    state.by = event.target.value;
    if (state.by === "gene" && !state.gene) state.gene = data.genes[0];
    if ($("gene")) $("gene").value = state.by === "gene" ? state.gene.name : "";
    $("gene-said").textContent = "";
    await recolour();
  });
  $("gene")?.addEventListener("change", async (event) => {
    const asked = event.target.value.trim(), found = genes.get(asked.toUpperCase());
    if (!asked) return;
    $("gene-said").textContent = found ? "" : `${asked} is not among the ${data.genes.length} genes in this page: markers and the most variable ones.`;
    if (!found) return;
    Object.assign(state, { by: "gene", gene: found });
    event.target.value = found.name; $("colour-by").value = "gene";
    await recolour();
  });
  document.querySelectorAll("[data-drag]").forEach((one) => one.addEventListener("click", () => setDrag(state.drag === one.dataset.drag ? "" : one.dataset.drag)));
  document.querySelectorAll("[data-zoom]").forEach((one) => one.addEventListener("click", () => (Number(one.dataset.zoom) ? zoom(Number(one.dataset.zoom)) : whole())));
  $("picture").addEventListener("click", () => canvas.toBlob((blob) => save(blob, "cells.png")));
  new ResizeObserver(() => { if (ready && !printing) draw(); }).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  const print = (now) => { printing = now; background = rgb(now ? "#ffffff" : css("--surface")); if (ready && shades) { recolour(); paint(); } };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));

  /* ---- start ---- */

  (async () => {
    const [x, y] = await Promise.all([numbers(data.x), numbers(data.y)]);
    px = Float32Array.from(x); py = Float32Array.from(y);
    extent = [px, py].map((one) => Math.max(one.reduce((most, value) => (value > most ? value : most), 0), 1));
    setDrag(matchMedia("(pointer: coarse)").matches ? "" : "move");
    await recolour();
    for (const column of columns.values()) column.values ??= await numbers(column.codes);
    for (const score of scores.values()) score.steps ??= await unpack(score.values);
    if (data.names) cellNames = new TextDecoder().decode(await unpack(data.names)).split("\n");
    ready = true;
    canvas.dataset.ready = "1";
  })();
}
