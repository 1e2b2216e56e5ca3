/* The map of a report: its cells are unpacked from the page, and a lasso tells what is inside. */
"use strict";
{
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("map-data").textContent);
  const n = data.cells, MISSING = 255;

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const numbers = async (text) => {
    const bytes = await unpack(text);
    return bytes.length === n ? bytes : new Uint16Array(bytes.buffer);
  };
  const columns = new Map(data.columns.map((one) => [one.id, { ...one, named: !one.id.startsWith("sample"), codes: null, packed: one.codes }]));
  const scores = new Map(data.scores.map((one) => [one.id, one]));
  const genes = new Map((data.genes ?? []).map((one) => [one.name.toUpperCase(), { id: "gene", gene: true, low: 0, ...one }]));
  const coded = async (column) => { column.codes ??= await numbers(column.packed); return column; };
  const stepped = async (score) => { score.steps ??= await unpack(score.values); return score; };
  let gene = null, cellNames = null, selection = null;

  /* ---- a cell and a selection in words ---- */

  const said = (i) => {
    const lines = [cellNames?.[i]];
    for (const { codes, levels, title } of columns.values()) if (codes && codes[i] < levels.length) lines.push(`${title}: ${levels[codes[i]]}`);
    for (const { steps, low, high, title } of scores.values()) if (steps && steps[i] !== MISSING) lines.push(`${title}: ${(low + (high - low) * steps[i] / 254).toFixed(2)}`);
    if (gene?.steps && $("colour-by").value === "gene") lines.push(`${gene.name}: ${(gene.high * gene.steps[i] / 254).toFixed(2)}`);
    return lines.filter(Boolean).join("\n");
  };
  const map = cellMap({
    canvas: $("cells"), tip: $("tip"), legend: $("legend"), scale: $("scale"), tools: $("tools"), drag: "move", said,
    selected: (inside) => tell(inside),
  });

  const node = (tag, text, properties = {}) => Object.assign(document.createElement(tag), { textContent: text, ...properties });
  const tell = async (found) => {
    const box = $("selection");
    selection = found;
    box.hidden = !found;
    if (!found) return;
    const { codes, levels } = columns.get("label"), sizes = new Map(), cells = found.reduce((sum, one) => sum + one, 0);
    for (let i = 0; i < n; i++) if (found[i]) sizes.set(codes[i], (sizes.get(codes[i]) ?? 0) + 1);
    const parts = [...sizes].sort((one, other) => other[1] - one[1]);
    const words = parts.slice(0, 6).map(([code, size]) => `${levels[code]} ${number.format(size)} (${percent(size / cells)})`);
    const lines = [node("p", `${plural(cells, "cell")} selected: ${words.join(", ")}${parts.length > 6 ? ` and ${parts.length - 6} more labels` : ""}.`)];
    const raised = node("p", "");
    lines.push(raised);
    const actions = [["Clear", () => { map.select(null); tell(null); }]];
    if (cellNames) {
      const table = () => ["cell,label", ...cellNames.flatMap((name, i) => (found[i] ? [[name, levels[codes[i]]].map(quoted).join(",")] : []))].join("\n");
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
    for (const one of genes.values()) {
      const { steps } = await stepped(one);
      if (selection !== found) return ""; // the reader has drawn around others meanwhile
      let here = 0, elsewhere = 0, there = 0;
      for (let i = 0; i < n; i++) { const value = steps[i]; if (found[i]) { here += value; there += value > 0; } else elsewhere += value; }
      ranked.push([one.name, one.high / 254 * (here / cells - elsewhere / (n - cells)), there / cells]);
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

  /* ---- colours ---- */

  const recolour = async () => {
    const by = $("colour-by").value, column = columns.get(by), score = by === "gene" ? gene : scores.get(by);
    const layer = await (column ? coded(column) : stepped(score));
    if ($("colour-by").value === by && (by !== "gene" || layer === gene)) map.colour(layer); // the reader may have been quicker
  };
  $("colour-by").addEventListener("change", async (event) => {
    const { value } = event.target;
    if (value === "gene") gene ??= genes.values().next().value;
    if ($("gene")) $("gene").value = value === "gene" ? gene.name : "";
    $("gene-said").textContent = "";
    await recolour();
  });
  $("gene")?.addEventListener("change", async (event) => {
    const asked = event.target.value.trim(), found = genes.get(asked.toUpperCase());
    if (!asked) return;
    $("gene-said").textContent = found ? "" : `${asked} is not among the ${data.genes.length} genes in this page: markers and the most variable ones.`;
    if (!found) return;
    gene = found;
    event.target.value = found.name; $("colour-by").value = "gene";
    await recolour();
  });

  (async () => {
    const [x, y] = await Promise.all([numbers(data.x), numbers(data.y)]);
    map.place(x, y);
    await recolour();
    for (const column of columns.values()) await coded(column);
    for (const score of scores.values()) await stepped(score);
    if (data.names) cellNames = new TextDecoder().decode(await unpack(data.names)).split("\n");
    $("cells").dataset.ready = "1";
  })();
}
