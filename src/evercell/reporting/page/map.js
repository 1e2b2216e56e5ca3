/* The map of the cells, in a report and on the page of `evercell serve`. Points are written into the pixels of a canvas:
   100,000 of them in some hundredths of a second, with or without a GPU. Text of the data is put in as text only. */
"use strict";

/* Numbers in words, for the scripts after this one too. */
const number = new Intl.NumberFormat("en");
const percent = (share) => (share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(1)}%`);
const plural = (count, word) => `${number.format(count)} ${word}${count === 1 ? "" : "s"}`;

/**
 * A map in a page that has its elements.
 *
 * @param canvas, tip, legend, scale  what is drawn on, says what is known of a cell, lists labels, and shows the ends of a score
 * @param tools     holds the buttons [data-drag], [data-zoom] and [data-picture]
 * @param drag      what dragging does at first where there is a mouse: "move" or "lasso"
 * @param said      (cell) => lines about it
 * @param selected  (inside) => what follows on a lasso: 1 for each cell inside, or null where there is none
 * @returns place(x, y) takes new cells, colour(layer) colours them, select(inside) fades all others.
 *
 * A layer has an id and either `levels`, `colours`, `codes` (one after the last level: no label) and `named`, whether names stand on
 * the map; or `steps` (0 to 254, 255: no value), `low`, `high` and `gene`, whether its zeros are cells without a gene.
 */
function cellMap({ canvas, tip, legend, scale, tools, drag, said, selected }) {
  const context = canvas.getContext("2d");
  const MISSING = 255, RAMP_STEPS = 255, MOST_LISTED = 150;
  const state = { drag: "", picked: null, x: 0, y: 0, scale: 1, printing: false };
  let n = 0, px = [], py = [], extent = [1, 1], hidden = new Map(), layer = null;
  let pixels, image = null, shades = null, order = null, background, ink, gone = null, waiting = false, path = null;

  /* ---- colours ---- */

  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const word = ([red, green, blue]) => (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
  const mixed = (one, other, share) => one.map((value, at) => Math.round(value + (other[at] - value) * share));
  const dark = () => !state.printing && matchMedia("(prefers-color-scheme: dark)").matches;
  const along = (stops) => Array.from({ length: RAMP_STEPS }, (_, step) => {
    const place = step / (RAMP_STEPS - 1) * (stops.length - 1), first = Math.min(Math.floor(place), stops.length - 2);
    return mixed(stops[first], stops[first + 1], place - first);
  });
  const ramp = () => {
    if (!layer.gene) return along(["#7b4fb3", "#4a78b5", "#2b9a98", "#55b866", "#c3cf3a"].map(rgb));
    const none = dark() ? "#39434f" : "#d5dbe2"; // a cell without the gene stays to be seen
    return along((dark() ? [none, "#4d6fa8", "#7fb2f0", "#f3f6ff"] : [none, "#8fb3dc", "#2f6db0", "#10284f"]).map(rgb));
  };

  const refresh = () => {
    if (!layer) return;
    const style = getComputedStyle(canvas), channels = (text) => text.match(/\d+/g).slice(0, 3).map(Number);
    background = state.printing ? [255, 255, 255] : channels(style.backgroundColor);
    ink = state.printing ? [28, 36, 48] : channels(style.color);
    const grey = mixed(background, [128, 128, 128], 0.4);
    const colours = [...(layer.levels ? layer.colours.map(rgb) : ramp()), grey];
    const faded = colours.map((one) => word(mixed(background, one, dark() ? 0.28 : 0.16)));
    shades = { words: new Uint32Array(colours.map(word)), faded: new Uint32Array(faded) };
    order = layer.levels ? null : sorted(layer.steps);
    hide();
    describe();
    draw();
  };
  const values = () => layer.codes ?? layer.steps;
  const hide = () => {
    const names = hidden.get(layer.id);
    gone = layer.levels && names?.size ? Uint8Array.from([...layer.levels, ""], (name) => Number(names.has(name))) : null;
  };

  /** Cells by rising step, missing ones first, so that high values lie on top. */
  const sorted = (steps) => {
    const starts = new Uint32Array(257), places = new Uint32Array(n);
    const rank = (value) => (value === MISSING ? 0 : value + 1);
    for (let i = 0; i < n; i++) starts[rank(steps[i]) + 1]++;
    for (let step = 1; step < 257; step++) starts[step] += starts[step - 1];
    for (let i = 0; i < n; i++) places[starts[rank(steps[i])]++] = i;
    return places;
  };

  /* ---- drawing ---- */

  const measure = () => {
    const ratio = state.printing ? 2 : Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(Math.round(canvas.clientWidth * ratio), 2), height = Math.max(Math.round(canvas.clientHeight * ratio), 2);
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; image = null; }
    image ??= context.createImageData(width, height);
    pixels = new Uint32Array(image.data.buffer);
    return ratio;
  };
  const view = () => {
    const ratio = canvas.width / Math.max(canvas.clientWidth, 1), pad = 26 * ratio;
    const fit = Math.min((canvas.width - 2 * pad) / extent[0], (canvas.height - 2 * pad) / extent[1]) * state.scale;
    return { ratio, fit, left: canvas.width / 2 - (extent[0] / 2 + state.x) * fit, top: canvas.height / 2 + (extent[1] / 2 + state.y) * fit };
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
    if (!shades || !canvas.clientWidth) return;
    const ratio = measure(), { width, height } = canvas, codes = values(), { picked } = state;
    pixels.fill(word(background));
    const { fit, left, top } = view();
    const size = (n > 50000 ? 1.1 : n > 20000 ? 1.5 : n > 5000 ? 2.1 : n > 1000 ? 2.8 : 3.6) * Math.min(Math.sqrt(state.scale), 2.5) * ratio * Math.min(1, Math.max(0.6, width / ratio / 800));
    const dots = stamp(size), reach = Math.ceil(size) + 1;
    const one = (i, words) => {
      const x = Math.round(left + px[i] * fit), y = Math.round(top - py[i] * fit);
      if (x < reach || y < reach || x >= width - reach || y >= height - reach) return;
      const colour = words[codes[i] === MISSING && order ? RAMP_STEPS : codes[i]];
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
    if (picked) for (let k = 0; k < n; k++) { const i = order ? order[k] : k; if (!picked[i] && !gone?.[codes[i]]) one(i, shades.faded); }
    for (let k = 0; k < n; k++) { const i = order ? order[k] : k; if ((!picked || picked[i]) && !gone?.[codes[i]]) one(i, shades.words); }
    context.putImageData(image, 0, 0);
    if (layer.named) names();
    if (path) outline(ratio);
  };
  const draw = () => { if (!waiting) { waiting = true; requestAnimationFrame(paint); } };

  /** Names of the labels where most of their cells are; a name that would cover another is left to the legend. */
  const names = () => {
    const { ratio, fit, left, top } = view();
    layer.centres ??= centres(layer.codes, layer.levels.length);
    const taken = [];
    context.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    context.textAlign = "center"; context.textBaseline = "middle"; context.lineJoin = "round";
    const total = layer.centres.map((one, code) => [one, code]).filter(([one]) => one).sort(([one], [other]) => other[2] - one[2]);
    for (const [[cx, cy, cells], code] of total) {
      const full = layer.levels[code], name = full.length > 28 ? `${full.slice(0, 27)}…` : full;
      if (full === "Unknown" || gone?.[code]) continue;
      const half = context.measureText(name).width / 2 + 3 * ratio;
      if (2 * half > canvas.width) continue;
      const x = Math.min(Math.max(left + cx * fit, half), canvas.width - half), y = top - cy * fit - (cells < 0.02 * n ? 13 * ratio : 0);
      if (y < 9 * ratio || y > canvas.height - 9 * ratio) continue;
      if (left + cx * fit < 0 || left + cx * fit > canvas.width) continue;
      const box = [x - half, x + half, y - 9 * ratio, y + 9 * ratio];
      if (taken.some((other) => box[0] < other[1] && other[0] < box[1] && box[2] < other[3] && other[2] < box[3])) continue;
      taken.push(box);
      context.strokeStyle = `rgb(${background.join(" ")} / .85)`; context.lineWidth = 4 * ratio; context.strokeText(name, x, y);
      context.fillStyle = `rgb(${ink.join(" ")})`; context.fillText(name, x, y);
    }
  };
  /** Of each label the median of its cells in and around the fullest of 12 x 12 fields: on its largest island, not in a gap. */
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
      const [fullest] = [...found].reduce((best, one) => (one[1].length > best[1].length ? one : best));
      const beside = (field) => Math.abs(field % 12 - fullest % 12) < 2 && Math.abs(Math.floor(field / 12) - Math.floor(fullest / 12)) < 2;
      const island = [...found].flatMap(([field, cells]) => (beside(field) ? cells : []));
      const middle = (of) => Float32Array.from(island, (i) => of[i]).sort()[island.length >> 1];
      return [middle(px), middle(py), [...found.values()].reduce((sum, one) => sum + one.length, 0)];
    });
  };
  const outline = (ratio) => {
    context.beginPath();
    path.forEach(([x, y], at) => (at ? context.lineTo(x * ratio, y * ratio) : context.moveTo(x * ratio, y * ratio)));
    context.closePath();
    context.strokeStyle = `rgb(${ink.join(" ")})`; context.lineWidth = 1.5 * ratio; context.setLineDash([6 * ratio, 4 * ratio]);
    context.stroke(); context.setLineDash([]);
  };

  /* ---- legend ---- */

  const node = (tag, text, properties = {}) => Object.assign(document.createElement(tag), { textContent: text, ...properties });
  const describe = () => {
    legend.hidden = !layer.levels; scale.hidden = Boolean(layer.levels);
    if (!layer.levels) {
      const [low, bar, high] = scale.children;
      low.textContent = layer.low.toFixed(2); high.textContent = layer.high.toFixed(2);
      bar.style.background = `linear-gradient(90deg, ${ramp().filter((_, at) => at % 16 === 0).map((one) => `rgb(${one.join(" ")})`).join(", ")})`;
      return;
    }
    const { levels } = layer, sizes = new Uint32Array(levels.length + 1);
    for (let i = 0; i < n; i++) sizes[layer.codes[i]]++;
    const last = (code) => Number(levels[code] === "Unknown");
    const codes = [...levels.keys()].filter((code) => sizes[code]).sort((a, b) => last(a) - last(b) || sizes[b] - sizes[a]);
    const away = hidden.get(layer.id) ?? new Set(), shown = codes.map((code) => levels[code]);
    const buttons = codes.slice(0, MOST_LISTED).map((code) => {
      const name = levels[code], button = node("button", "", { type: "button", title: "Click: hide or show. Double click, or with Shift: show this one alone." });
      const dot = node("i", "", { className: "dot" });
      dot.style.background = layer.colours[code];
      button.append(dot, `${name} `, node("small", number.format(sizes[code])));
      button.addEventListener("click", (event) => { if (event.shiftKey) alone(name); else change(() => { away.delete(name) || away.add(name); }); });
      button.addEventListener("dblclick", (event) => { if (!event.shiftKey) alone(name); });
      return button;
    });
    const pressed = () => buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(!away.has(shown[at]))));
    const change = (action) => { action(); hidden.set(layer.id, away); hide(); pressed(); draw(); };
    const alone = (name) => change(() => {
      const others = shown.filter((one) => one !== name), before = others.every((one) => away.has(one));
      away.clear();
      if (!before) others.forEach((one) => away.add(one));
    });
    pressed();
    const rest = codes.length > MOST_LISTED ? [node("span", `and ${number.format(codes.length - MOST_LISTED)} more`)] : [];
    legend.replaceChildren(...[...buttons, ...rest].map((one) => { const item = node("li", ""); item.append(one); return item; }));
  };

  /* ---- what the reader does ---- */

  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const nearest = ([x, y]) => {
    const { ratio, fit, left, top } = view(), codes = values();
    const mx = (x * ratio - left) / fit, my = (top - y * ratio) / fit;
    let best = -1, least = (9 * ratio / fit) ** 2;
    for (let i = 0; i < n; i++) {
      const dx = px[i] - mx, dy = py[i] - my, far = dx * dx + dy * dy;
      if (far < least && !gone?.[codes[i]]) { least = far; best = i; }
    }
    return best;
  };
  const hover = (point) => {
    const found = layer ? nearest(point) : -1;
    tip.hidden = found < 0;
    if (found < 0) return;
    tip.textContent = said(found);
    const right = point[0] > canvas.clientWidth / 2, low = point[1] > canvas.clientHeight / 2;
    tip.style.left = right ? "auto" : `${point[0] + 14}px`;
    tip.style.right = right ? `${canvas.clientWidth - point[0] + 14}px` : "auto";
    tip.style.top = low ? "auto" : `${point[1] + 12}px`;
    tip.style.bottom = low ? `${canvas.clientHeight - point[1] + 12}px` : "auto";
  };
  const zoom = (factor, [x, y] = [canvas.clientWidth / 2, canvas.clientHeight / 2]) => {
    const before = view(), { ratio } = before;
    const mx = (x * ratio - before.left) / before.fit, my = (before.top - y * ratio) / before.fit;
    state.scale = Math.min(Math.max(state.scale * factor, 0.5), 80);
    const { fit } = view();
    state.x = mx - extent[0] / 2 - (x * ratio - canvas.width / 2) / fit;
    state.y = my - extent[1] / 2 + (y * ratio - canvas.height / 2) / fit;
    draw();
  };
  const move = (dx, dy) => { const { ratio, fit } = view(); state.x -= dx * ratio / fit; state.y += dy * ratio / fit; draw(); };
  const whole = () => { Object.assign(state, { x: 0, y: 0, scale: 1 }); draw(); };
  const setDrag = (name) => {
    state.drag = name;
    tools.querySelectorAll("[data-drag]").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.drag === name)));
    canvas.style.touchAction = name ? "none" : "auto";
    canvas.style.cursor = name === "lasso" ? "crosshair" : name ? "grab" : "default";
  };

  const fingers = new Map(); // a mouse that is pressed is one, too
  const spread = () => { const [[ax, ay], [bx, by]] = fingers.values(); return [Math.hypot(ax - bx, ay - by), [(ax + bx) / 2, (ay + by) / 2]]; };
  canvas.addEventListener("pointerdown", (event) => {
    if (!layer || !state.drag || event.button || fingers.size > 1) return;
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, at(event));
    path = state.drag === "lasso" && fingers.size === 1 ? [at(event)] : null;
    tip.hidden = true;
  });
  canvas.addEventListener("pointermove", (event) => {
    const point = at(event), last = fingers.get(event.pointerId);
    if (!last) { if (!fingers.size) hover(point); return; }
    if (path) { path.push(point); draw(); return; }
    const before = fingers.size === 2 ? spread() : null;
    fingers.set(event.pointerId, point);
    if (!before) { move(point[0] - last[0], point[1] - last[1]); return; }
    const [far, middle] = spread();
    move(middle[0] - before[1][0], middle[1] - before[1][1]);
    zoom(far / Math.max(before[0], 1), middle);
  });
  const end = (event) => {
    if (!fingers.delete(event.pointerId) || !path) return;
    const drawn = path.length > 3 ? inside(path) : null;
    path = null;
    pick(drawn);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", (event) => { path = null; end(event); draw(); });
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
      "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: whole, Escape: () => pick(null),
    };
    if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); keys[event.key](); }
  });

  const inside = (edge) => {
    const { ratio, fit, left, top } = view(), codes = values();
    const xs = edge.map(([x]) => (x * ratio - left) / fit), ys = edge.map(([, y]) => (top - y * ratio) / fit);
    const [low, high] = [Math.min(...xs), Math.max(...xs)], found = new Uint8Array(n), m = xs.length;
    for (let i = 0; i < n; i++) {
      const x = px[i], y = py[i];
      if (x < low || x > high || gone?.[codes[i]]) continue;
      for (let a = 0, b = m - 1; a < m; b = a++) if ((ys[a] > y) !== (ys[b] > y) && x < (xs[b] - xs[a]) * (y - ys[a]) / (ys[b] - ys[a]) + xs[a]) found[i] ^= 1;
    }
    return found.includes(1) ? found : null;
  };
  const select = (found) => { state.picked = found; draw(); };
  const pick = (found) => { select(found); selected(found); };
  const picture = () => canvas.toBlob((blob) => {
    const link = node("a", "", { href: URL.createObjectURL(blob), download: "cells.png" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  tools.querySelectorAll("[data-drag]").forEach((one) => one.addEventListener("click", () => setDrag(state.drag === one.dataset.drag ? "" : one.dataset.drag)));
  tools.querySelectorAll("[data-zoom]").forEach((one) => one.addEventListener("click", () => (Number(one.dataset.zoom) ? zoom(Number(one.dataset.zoom)) : whole())));
  tools.querySelector("[data-picture]").addEventListener("click", picture);
  new ResizeObserver(() => { if (!state.printing) draw(); }).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
  const print = (now) => { state.printing = now; refresh(); paint(); };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  setDrag(matchMedia("(pointer: coarse)").matches ? "" : drag);

  return {
    place(x, y) {
      const ends = [x, y].map((of) => of.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]));
      [px, py] = [x, y].map((of, axis) => Float32Array.from(of, (value) => value - ends[axis][0]));
      extent = ends.map(([low, high]) => (high > low ? high - low : 1));
      n = px.length; layer = null; shades = null; hidden = new Map(); path = null;
      Object.assign(state, { picked: null, x: 0, y: 0, scale: 1 });
      tip.hidden = true;
    },
    colour(next) { layer = next; refresh(); },
    select,
  };
}
