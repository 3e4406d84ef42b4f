"use strict";
// What moves on the inspector's page. Text of documents is only ever set as text (`textContent`), never as HTML.
(async () => {
  const $ = (id) => document.getElementById(id);
  const page = JSON.parse($("data").textContent);
  const arrays = await unpack($("block").textContent, page.arrays);
  const state = { run: 0, layer: 0, expert: 0, step: 0, token: 0 };

  // --- Data ---------------------------------------------------------------------------------------------------------

  // The block of bytes, inflated, with a typed array over every part of it: see packed.py.
  async function unpack(text, directory) {
    const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const made = {};
    for (const [name, { kind, shape, at }] of Object.entries(directory)) {
      made[name] = { data: new globalThis[kind](buffer, at, shape.reduce((a, b) => a * b, 1)), shape };
    }
    return made;
  }

  const run = () => page.runs[state.run];
  // By run, and by name without the run's number.
  const named = page.runs.map((_, r) => new Map(Object.entries(arrays).filter(([name]) => name.startsWith(`${r}/`))
    .map(([name, made]) => [name.slice(name.indexOf("/") + 1), made])));
  const has = (name, r = state.run) => named[r].has(name);
  const array = (name, r = state.run) => named[r].get(name);
  // The number at these places, as many as the array has dimensions.
  function at(name, ...places) {
    const { data, shape } = array(name);
    let index = 0;
    for (let d = 0; d < places.length; d++) index = index * shape[d] + places[d];
    return data[index];
  }
  const string = (number) => (number < 0 ? "" : run().strings[number]);
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const rows = (layer, expert) => sum(range(run().domains.length).map((d) => at("domain", layer, d, expert)));

  // Loads of every layer and what they sum to, once per run.
  const loads = page.runs.map((r, i) => {
    state.run = i;
    const ofExpert = r.layers.map((_, layer) => range(r.n_experts[layer]).map((e) => rows(layer, e)));
    const ofDomain = r.layers.map((_, layer) =>
      r.domains.map((_, d) => sum(range(r.n_experts[layer]).map((e) => at("domain", layer, d, e)))));
    return { ofExpert, ofDomain, total: ofExpert.map(sum) };
  });
  state.run = 0;
  const loadRatio = (layer, e) => {
    const { ofExpert, total } = loads[state.run];
    return total[layer] ? (ofExpert[layer][e] * run().n_experts[layer]) / total[layer] : 0;
  };
  // How many times as often an expert takes a domain as it takes anything; null without rows.
  const domainLift = (layer, d, e) => {
    const { ofExpert, ofDomain, total } = loads[state.run];
    const expected = (ofExpert[layer][e] * ofDomain[layer][d]) / total[layer];
    return expected ? at("domain", layer, d, e) / expected : null;
  };

  // --- Small helpers ------------------------------------------------------------------------------------------------

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in made && name !== "role") made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }
  const times = (ratio) => (ratio >= 10 ? ratio.toFixed(0) : ratio >= 1 ? ratio.toFixed(1) : ratio.toFixed(2));
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
  const whole = (n) => n.toLocaleString("en");
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const layerName = (layer) => `layer ${run().layers[layer]}`;

  function save(name, kind, content) {
    const link = element("a", { href: URL.createObjectURL(new Blob([content], { type: kind })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  const csvLine = (cells) => cells.map((cell) => `"${String(cell ?? "").replaceAll('"', '""')}"`).join(",");
  const saver = (choices) => {
    const line = element("p", { className: "save note" });
    for (const [name, action] of choices) line.append(element("button", { type: "button", onclick: action }, name), " ");
    return line;
  };

  // What is under the pointer, beside it.
  function tip(event, text) {
    const box = $("tip");
    box.hidden = !text;
    if (!text) return;
    box.textContent = text;
    const { innerWidth, innerHeight } = window;
    box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
    box.style.top = `${Math.min(event.clientY + 16, innerHeight - box.offsetHeight - 8)}px`;
  }

  // --- Heat maps ----------------------------------------------------------------------------------------------------

  // Colours of ratios, from a quarter (or less) over 1 to 4 times (or more), by the theme.
  const STEPS = 128;
  let colours;
  function readColours() {
    const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (name) => {
      paint.fillStyle = style(name);
      paint.fillRect(0, 0, 1, 1);
      return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const [low, even, high, paper] = ["--low", "--even", "--high", "--paper"].map(rgb);
    const mix = (a, b, share) => a.map((v, i) => Math.round(v + (b[i] - v) * share));
    colours = { paper, ratio: range(2 * STEPS + 1).map((i) => mix(even, i < STEPS ? low : high, Math.abs(i - STEPS) / STEPS)) };
  }
  const colour = (ratio) => {
    if (ratio === null || Number.isNaN(ratio)) return colours.paper;
    const place = Math.max(-2, Math.min(2, Math.log2(Math.max(ratio, 1e-9)))) / 2;
    return colours.ratio[Math.round((place + 1) * STEPS)];
  };

  class HeatMap {
    // `id`: of the box; `choose(row, column)`: what a click or Enter does; `of`: what 1 is, for the legend.
    constructor(id, label, of, choose) {
      Object.assign(this, { id, choose, box: $(id), said: $(`${id}-said`), cursor: null });
      this.canvas = element("canvas");
      this.over = element("canvas");
      this.box.append(this.canvas, this.over);
      Object.entries({ tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-label": label })
        .forEach(([name, value]) => this.box.setAttribute(name, value));
      this.legend = element("div", { className: "legend" }, "¼", element("span", { className: "bar" }), "4");
      this.legend.append(element("span", {}, of));
      const saved = saver([["CSV", () => this.saveCsv()], ["PNG", () => this.canvas.toBlob((blob) => save(`${id}.png`, "image/png", blob))]]);
      this.box.parentElement.after(this.legend, saved);
      this.box.addEventListener("pointermove", (event) => this.hover(event));
      this.box.addEventListener("pointerleave", (event) => { this.cursor = null; this.mark(); tip(event, ""); });
      this.box.addEventListener("click", (event) => { const cell = this.cell(event); if (cell) this.choose(...cell); });
      this.box.addEventListener("keydown", (event) => this.key(event));
    }

    // what: {rows, columns, value(r, c), rowName(r), columnName(c), say(r, c), chosen: [r, c] or null, square, marks(r, c)}
    draw(what) {
      Object.assign(this, { what });
      const empty = !what || !what.rows || !what.columns;
      for (const part of [this.box, this.legend, this.legend.nextSibling]) part.hidden = empty;
      if (empty) return;
      const { rows: n, columns: m } = what;
      // Sizes: as wide as there is room for, but no cell so small that it cannot be pointed at.
      const ratio = window.devicePixelRatio || 1;
      this.left = 10 + 7.2 * Math.max(...range(n).map((r) => Math.min(14, what.rowName(r).length)));
      const room = this.box.parentElement.clientWidth - this.left - 2;
      this.w = Math.max(4, Math.min(what.square ? 22 : 44, Math.floor(room / m)));
      this.h = what.square ? this.w : Math.max(7, Math.min(26, Math.floor(440 / n)));
      const [width, height] = [this.left + this.w * m, this.h * n + 18];
      for (const canvas of [this.canvas, this.over]) {
        canvas.width = width * ratio;
        canvas.height = height * ratio;
        canvas.style.width = `${width}px`;
        canvas.style.height = `${height}px`;
      }
      // Cells: one pixel each, then enlarged.
      const small = document.createElement("canvas");
      small.width = m;
      small.height = n;
      const pixels = new ImageData(m, n);
      const dead = [];
      for (let r = 0; r < n; r++) {
        for (let c = 0; c < m; c++) {
          const value = what.value(r, c);
          if (value === 0) dead.push([r, c]);
          pixels.data.set([...colour(value), value === null ? 0 : 255], 4 * (r * m + c));
        }
      }
      small.getContext("2d").putImageData(pixels, 0, 0);
      const paint = this.canvas.getContext("2d");
      paint.scale(ratio, ratio);
      paint.fillStyle = style("--paper");
      paint.fillRect(0, 0, width, height);
      paint.imageSmoothingEnabled = false;
      paint.drawImage(small, this.left, 0, this.w * m, this.h * n);
      // Between cells that are large enough, gaps; on those with nothing, a cross; marks.
      paint.strokeStyle = style("--paper");
      paint.beginPath();
      if (this.w >= 9) for (let c = 0; c <= m; c++) this.line(paint, this.left + c * this.w, 0, this.left + c * this.w, this.h * n);
      if (this.h >= 9) for (let r = 0; r <= n; r++) this.line(paint, this.left, r * this.h, width, r * this.h);
      paint.stroke();
      paint.strokeStyle = style("--ink");
      paint.beginPath();
      for (const [r, c] of dead.slice(0, 20000)) {
        const [x, y, d] = [this.left + (c + 0.5) * this.w, (r + 0.5) * this.h, Math.min(this.w, this.h) / 3.2];
        this.line(paint, x - d, y - d, x + d, y + d);
        this.line(paint, x - d, y + d, x + d, y - d);
      }
      paint.stroke();
      // Names: as many as fit.
      paint.fillStyle = style("--soft");
      paint.font = "12px system-ui, sans-serif";
      paint.textBaseline = "middle";
      paint.textAlign = "right";
      const each = Math.ceil(14 / this.h);
      for (let r = 0; r < n; r += each) {
        const name = what.rowName(r);
        paint.fillText(name.length > 14 ? `${name.slice(0, 13)}…` : name, this.left - 6, (r + 0.5) * this.h);
      }
      paint.textAlign = "center";
      const apart = Math.ceil((8 + 7 * Math.max(...range(m).map((c) => what.columnName(c).length))) / this.w);
      for (let c = 0; c < m; c += apart) paint.fillText(what.columnName(c), this.left + (c + 0.5) * this.w, this.h * n + 10);
      this.mark();
    }

    // Frame another cell.
    frameCell(cell) {
      if (!this.what) return;
      this.what.chosen = cell;
      this.mark();
    }

    line(paint, x, y, toX, toY) {
      paint.moveTo(x, y);
      paint.lineTo(toX, toY);
    }

    // Frames round the chosen cell and the one that is pointed at.
    mark() {
      if (!this.what || !this.w) return;
      const ratio = window.devicePixelRatio || 1;
      const paint = this.over.getContext("2d");
      paint.setTransform(ratio, 0, 0, ratio, 0, 0);
      paint.clearRect(0, 0, this.over.width, this.over.height);
      const frame = ([r, c], tone, thick) => {
        paint.strokeStyle = tone;
        paint.lineWidth = thick;
        paint.strokeRect(this.left + c * this.w + 0.5, r * this.h + 0.5, this.w - 1, this.h - 1);
      };
      const { chosen, marked } = this.what;
      paint.fillStyle = style("--ink");
      for (const [r, c] of marked || []) {
        paint.beginPath();
        paint.arc(this.left + (c + 0.5) * this.w, (r + 0.5) * this.h, Math.min(3, this.w / 4), 0, 7);
        paint.fill();
      }
      if (chosen && chosen[1] >= 0) frame(chosen, style("--ink"), 2.5);
      if (this.cursor) frame(this.cursor, style("--mark"), 2);
    }

    cell(event) {
      const place = this.box.getBoundingClientRect();
      const [c, r] = [Math.floor((event.clientX - place.left - this.left) / this.w), Math.floor((event.clientY - place.top) / this.h)];
      return r >= 0 && r < this.what.rows && c >= 0 && c < this.what.columns ? [r, c] : null;
    }

    hover(event) {
      const cell = this.cell(event);
      if (String(cell) === String(this.cursor)) return;
      this.cursor = cell;
      this.mark();
      tip(event, cell ? this.what.say(...cell) : "");
    }

    key(event) {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      const [r, c] = this.cursor || this.what.chosen || [0, 0];
      if (event.key in moves) {
        const [down, right] = moves[event.key];
        this.cursor = [Math.max(0, Math.min(this.what.rows - 1, r + down)), Math.max(0, Math.min(this.what.columns - 1, c + right))];
        this.said.textContent = this.what.say(...this.cursor);
        this.mark();
      } else if (event.key === "Enter" || event.key === " ") this.choose(r, c);
      else if (event.key === "Escape") this.cursor = null;
      else return;
      event.preventDefault();
    }

    saveCsv() {
      const { rows: n, columns: m, rowName, columnName, value } = this.what;
      const lines = range(n).map((r) => csvLine([rowName(r), ...range(m).map((c) => value(r, c))]));
      save(`${this.id}.csv`, "text/csv", [csvLine(["", ...range(m).map(columnName)]), ...lines].join("\n"));
    }
  }

  // --- Sections -----------------------------------------------------------------------------------------------------

  const maps = {
    load: new HeatMap("load-map", "Load by MoE layer and expert", "times a fair share", (r, c) => choose(r, order(r)[c])),
    domain: new HeatMap("domain-map", "Domains by expert of the chosen layer", "times as often as the expert takes anything", (r, c) => choose(state.layer, c)),
    pair: new HeatMap("pair-map", "Pairs of experts", "times as often as by chance", (r, c) => choosePair(r, c)),
    time: new HeatMap("time-map", "Effective experts by layer and step", "times an even load’s (1 is even)", (r, c) => chooseStep(c)),
  };

  // The experts of a layer in the order of their columns.
  function order(layer) {
    const experts = range(run().n_experts[layer]);
    return $("order").value === "load" ? experts.sort((a, b) => loadRatio(layer, b) - loadRatio(layer, a) || a - b) : experts;
  }

  function drawLoad() {
    const measure = $("measure").value;
    const { layers, n_experts, domains } = run();
    const orders = layers.map((_, layer) => order(layer));
    const domain = measure.startsWith("domain ") ? Number(measure.slice(7)) : -1;
    const mean = measure === "importance" ? worthOfAll() : 1;
    const value = (layer, e) => {
      if (measure === "importance") {
        const cost = at("importance", layer, e, 0);
        return Number.isNaN(cost) ? null : Math.max(1e-6, cost / mean);
      }
      if (measure === "training") return at("history/load", state.step, layer, e) / run().scale;
      return domain < 0 ? loadRatio(layer, e) : domainLift(layer, domain, e);
    };
    const what = measure === "training" ? `of the batch of step ${at("history/load_steps", state.step)}` : "of all text";
    maps.load.draw({
      rows: layers.length,
      columns: Math.max(...n_experts),
      value: (r, c) => (c < n_experts[r] ? value(r, orders[r][c]) : null),
      rowName: (r) => `layer ${layers[r]}`,
      columnName: (c) => String($("order").value === "load" ? c + 1 : c),
      say: (r, c) => {
        if (c >= n_experts[r]) return "";
        const e = orders[r][c];
        if (measure === "importance") return `${layerName(r)}, expert ${e}: masked, the loss changes by ${at("importance", r, e, 0).toFixed(4)} nats`;
        const number = value(r, e);
        const ratio = number === null ? "no rows" : times(number);
        return domain < 0
          ? `${layerName(r)}, expert ${e}: ${ratio} times a fair share ${what}`
          : `${layerName(r)}, expert ${e}: takes ${domains[domain]} ${ratio} times as often as anything`;
      },
      chosen: [state.layer, orders[state.layer].indexOf(state.expert)],
    });
    $("slide").hidden = measure !== "training";
    if (measure === "training") $("step-said").textContent = at("history/load_steps", state.step);
  }

  // What masking an expert costs, the mean over all; at least something, to divide by.
  function worthOfAll() {
    const costs = range(run().layers.length).flatMap((layer) => range(run().n_experts[layer]).map((e) => at("importance", layer, e, 0)));
    const known = costs.filter((cost) => !Number.isNaN(cost));
    return Math.max(1e-6, sum(known) / Math.max(1, known.length));
  }

  function drawDomains() {
    const { domains, n_experts } = run();
    $("domains-said").textContent = domains.length < 2
      ? "The text has one domain: there is nothing to compare."
      : `Of ${layerName(state.layer)}: a row per domain, a column per expert. 1 is no preference, whatever the expert’s load.`;
    maps.domain.draw(domains.length < 2 ? null : {
      rows: domains.length,
      columns: n_experts[state.layer],
      value: (d, e) => domainLift(state.layer, d, e),
      rowName: (d) => domains[d],
      columnName: String,
      say: (d, e) => {
        const lift = domainLift(state.layer, d, e);
        const range = has("lift/low") ? ` (95% interval ${times(at("lift/low", state.layer, e, d) / run().scale)} to ${times(at("lift/high", state.layer, e, d) / run().scale)})` : "";
        return `${domains[d]}, expert ${e}: ${lift === null ? "no rows" : `taken ${times(lift)} times as often as anything`}${range}`;
      },
      chosen: null,
      marked: run().earned.filter((name) => name.layer === state.layer).map((name) => [name.domain, name.expert]),
    });
  }

  function topTokens(kind, layer, expert) {
    const list = element("div", { className: "tokens" });
    for (const n of range(array(`${kind}/token`).shape[2])) {
      const token = at(`${kind}/token`, layer, expert, n);
      if (token < 0) continue;
      const [taken, lift] = [at(`${kind}/rows`, layer, expert, n), at(`${kind}/lift`, layer, expert, n)];
      list.append(element("span", { title: `taken ${whole(taken)} times` }, string(token).replaceAll(" ", "·"), element("small", {}, ` ${times(lift)}×`)));
    }
    return list.childElementCount ? list : element("p", { className: "note" }, "No common token that it prefers.");
  }

  function partnerList(kind, layer, expert) {
    const list = element("div", { className: "tokens" });
    for (const n of range(array(`${kind}/expert`).shape[2])) {
      const other = at(`${kind}/expert`, layer, expert, n);
      if (other < 0 || list.childElementCount >= 6) continue;
      const to = kind === "onward" ? layer + 1 : layer;
      const button = element("button", { type: "button", onclick: () => choose(to, other) }, `${other}`);
      list.append(element("span", {}, button, element("small", {}, ` ${times(at(`${kind}/ratio`, layer, expert, n) / run().scale)}×`)));
    }
    return list.childElementCount ? list : element("p", { className: "note" }, "None that could be told from chance.");
  }

  function drawCard() {
    const { layer, expert } = state;
    const { domains, n_experts } = run();
    const card = $("card");
    const { ofExpert, total } = loads[state.run];
    const taken = ofExpert[layer][expert];
    const rank = 1 + ofExpert[layer].filter((n) => n > taken).length;
    const heading = element("h3", {}, `${layerName(layer)}, expert ${expert}`);
    const share = `${whole(taken)} of ${whole(total[layer])} rows, ${times(loadRatio(layer, expert))} times a fair share: number ${rank} of ${n_experts[layer]}.`;
    const column = (title, ...children) => element("div", {}, element("h3", {}, title), ...children);
    const columns = element("div", { className: "columns" });
    if (taken) {
      columns.append(column("Tokens it reads, and how many times as often as anything", topTokens("taken", layer, expert)));
      columns.append(column("Tokens it is to predict", topTokens("predicted", layer, expert)));
      if (domains.length > 1) {
        const list = element("div", { className: "tokens" });
        range(domains.length).map((d) => [domainLift(layer, d, expert), d]).filter(([lift]) => lift !== null).sort((a, b) => b[0] - a[0])
          .forEach(([lift, d]) => list.append(element("span", {}, domains[d], element("small", {}, ` ${times(lift)}×`))));
        columns.append(column("Domains", list));
      }
      if (has("together/expert")) columns.append(column("Others that its tokens go to", partnerList("together", layer, expert)));
      if (has("onward/expert") && layer + 1 < run().layers.length) columns.append(column("Where they go in the next layer", partnerList("onward", layer, expert)));
    }
    const contexts = element("div", {}, element("h3", {}, "Passages, drawn at random of the tokens it takes"));
    const { shape } = array("contexts");
    for (const n of range(shape[2])) {
      const middle = run().around;
      if (at("contexts", layer, expert, n, middle) < 0) continue;
      const line = element("div", { className: "passage" });
      for (const w of range(shape[3])) {
        const text = string(at("contexts", layer, expert, n, w));
        line.append(w === middle ? element("mark", {}, text) : text);
      }
      contexts.append(line);
    }
    card.replaceChildren(heading, element("p", {}, taken ? share : "No token of this text goes to it: it is dead here."), ...worth(layer, expert), columns);
    if (contexts.childElementCount > 1) card.append(contexts);
    $("layer").value = String(layer);
    $("number").max = n_experts[layer] - 1;
    $("number").value = expert;
    $("where").textContent = `${layerName(layer)} · expert ${expert}`;
  }

  // Sentences: the name that the expert has earned, what masking it does, and its nearest twin.
  function worth(layer, expert) {
    const said = [];
    for (const name of run().earned.filter((one) => one.layer === layer && one.expert === expert)) {
      said.push(`May be called after ${run().domains[name.domain]}: it takes that ${times(name.lift)} times as often as anything (${times(name.lift_low)} to ${times(name.lift_high)}).`);
    }
    if (has("importance") && !Number.isNaN(at("importance", layer, expert, 0))) {
      const [middle, low, high] = range(3).map((i) => at("importance", layer, expert, i).toFixed(4));
      said.push(`Masked, the loss changes by ${middle} nats per token (${low} to ${high}).`);
    }
    if (has("twin") && at("twin", layer, expert, 0) >= 0) {
      const [twin, alike, chance] = range(3).map((i) => at("twin", layer, expert, i));
      said.push(`Nearest twin: expert ${twin}, whose outputs have a cosine of ${alike.toFixed(2)} with its own (${chance.toFixed(2)} by chance).`);
    }
    return said.map((text) => element("p", {}, text));
  }

  function drawPairs() {
    const kind = $("pair-kind").value;
    const { n_experts, layers } = run();
    const { layer } = state;
    const known = has(`${kind}/expert`) && (kind === "together" || layer + 1 < layers.length);
    if (!known) {
      $("pairs-said").textContent = kind === "together" ? "A token takes one expert: there are no pairs." : "There is no MoE layer after this one.";
      maps.pair.draw(null);
      return;
    }
    const columns = kind === "together" ? n_experts[layer] : n_experts[layer + 1];
    const width = array(`${kind}/expert`).shape[2];
    const ratios = range(n_experts[layer]).map((e) => {
      const line = new Array(columns).fill(null);
      for (const n of range(width)) {
        const other = at(`${kind}/expert`, layer, e, n);
        if (other >= 0) line[other] = at(`${kind}/ratio`, layer, e, n) / run().scale;
      }
      return line;
    });
    const only = width < columns ? ` Only the ${width} strongest partners of each are kept.` : "";
    const to = kind === "together" ? layerName(layer) : layerName(layer + 1);
    $("pairs-said").textContent = `Of the tokens that take an expert of ${layerName(layer)} (row), how many times as many as by chance take an expert of ${to} (column). Blank: too few to say.${only}`;
    maps.pair.draw({
      rows: n_experts[layer],
      columns,
      square: true,
      value: (r, c) => ratios[r][c],
      rowName: String,
      columnName: String,
      say: (r, c) => `expert ${r} and ${to}’s expert ${c}: ${ratios[r][c] === null ? "too few to say" : `${times(ratios[r][c])} times chance`}`,
      chosen: null,
    });
  }
  function choosePair(r, c) {
    if ($("pair-kind").value === "onward") choose(state.layer + 1, c);
    else choose(state.layer, r);
  }

  function drawTime() {
    $("time-live").hidden = !has("history/effective");
    if (!has("history/effective")) return;
    const { shape } = array("history/effective");
    const [steps, layers] = shape;
    maps.time.draw({
      rows: layers,
      columns: steps,
      value: (r, c) => at("history/effective", c, r) || 1e-9,
      rowName: (r) => layerName(r),
      columnName: (c) => String(at("history/steps", c)),
      say: (r, c) => `${layerName(r)}, step ${at("history/steps", c)}: ${percent(at("history/effective", c, r))} of the experts effective, MaxVio ${at("history/max_vio", c, r).toFixed(2)}`,
      chosen: null,
    });
  }

  // A step of the map over time is one of the slider: the nearest that has loads.
  function chooseStep(column) {
    if (!has("history/load")) return;
    const wanted = at("history/steps", column);
    const steps = [...array("history/load_steps").data];
    state.step = steps.reduce((best, step, i) => (Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? i : best), 0);
    $("measure").value = "training";
    $("step").value = state.step;
    drawLoad();
    $("load").scrollIntoView({ block: "start" });
  }

  // --- Text ---------------------------------------------------------------------------------------------------------

  let passages = [];
  function readPassages() {
    const { data } = array("text/window");
    passages = [];
    data.forEach((window, i) => {
      const last = passages[passages.length - 1];
      if (last && last.window === window) last.end = i + 1;
      else passages.push({ window, begin: i, end: i + 1 });
    });
    const name = ({ begin, end }) => {
      const start = range(Math.min(12, end - begin)).map((i) => string(at("text/token", begin + i))).join("");
      return `${run().domains[at("text/domain", begin)]}: ${start.replace(/\s+/g, " ").slice(0, 40)}`;
    };
    $("passage").replaceChildren(...passages.map((passage, i) => element("option", { value: i }, name(passage))));
    const others = page.runs.map((_, r) => r).filter((r) => r !== state.run && sameText(r));
    $("beside-label").hidden = !others.length;
    $("beside").replaceChildren(element("option", { value: "" }, "nothing"), ...others.map((r) => element("option", { value: r }, page.runs[r].name)));
    if (others.length) $("beside").value = String(others[0]);
    state.token = 0;
  }
  // Whether another run's passages are these, token by token.
  function sameText(r) {
    const [mine, its] = [array("text/token"), array("text/token", r)];
    return mine.data.length === its.data.length
      && mine.data.every((number, i) => run().strings[number] === page.runs[r].strings[its.data[i]]);
  }

  // Experts and weights of a token in a layer.
  function choice(i, layer, r = state.run) {
    const { data, shape } = array("text/expert", r);
    const weights = array("text/weight", r).data;
    const first = (i * shape[1] + layer) * shape[2];
    const none = Math.max(...page.runs[r].n_experts);
    return range(shape[2]).map((k) => [data[first + k], weights[first + k] / 255]).filter(([e]) => e !== none);
  }

  function strength(i) {
    const kind = $("colour").value;
    if (kind === "loss") return Math.min(1, (at("text/loss", i) || 0) / 8);
    if (kind === "entropy") return at("text/entropy", i, state.layer) / 255;
    const [hit] = choice(i, state.layer).filter(([e]) => e === state.expert);
    return hit ? 0.25 + 0.75 * (run().weighted ? hit[1] : 1) : 0;
  }
  const tint = (share) => (share ? `color-mix(in srgb, var(--high) ${Math.round(65 * share)}%, transparent)` : "");

  function drawText() {
    const { begin, end } = passages[Number($("passage").value) || 0];
    if (state.token < begin || state.token >= end) state.token = begin;
    $("tokens").replaceChildren(...range(end - begin).flatMap((n) => {
      const i = begin + n;
      const text = string(at("text/token", i)) || "␀";
      const span = element("span", { id: `token-${i}`, role: "option" }, text);
      span.style.background = tint(strength(i));
      return text.includes("↵") ? [span, "\n"] : [span];
    }));
    drawToken();
  }
  function tintText() {
    for (const span of $("tokens").children) span.style.background = tint(strength(Number(span.id.slice(6))));
  }

  function drawToken(i = state.token) {
    for (const span of $("tokens").querySelectorAll(".here")) span.classList.remove("here");
    const here = $(`token-${i}`);
    if (!here) return;
    here.classList.add("here");
    $("tokens").setAttribute("aria-activedescendant", here.id);
    const other = $("beside").value === "" || $("beside-label").hidden ? null : Number($("beside").value);
    const body = element("tbody");
    run().layers.forEach((number, layer) => {
      const mine = choice(i, layer);
      const its = other === null ? [] : choice(i, layer, other);
      const cell = (list, r) => {
        const made = element("td");
        for (const [e, weight] of list) {
          const button = element("button", { type: "button", disabled: r !== state.run, onclick: () => choose(layer, e) }, String(e));
          made.append(button, page.runs[r].weighted ? ` ${percent(weight)} ` : " ");
        }
        return made;
      };
      const row = element("tr", {}, element("td", {}, `layer ${number}`), cell(mine, state.run));
      if (other !== null) row.append(cell(its, other));
      if (run().scored) row.append(element("td", {}, percent(at("text/entropy", i, layer) / 255)));
      body.append(row);
    });
    const names = other === null ? ["experts"] : [run().name, page.runs[other].name];
    const head = element("tr", {}, ...["", ...names, ...(run().scored ? ["entropy"] : [])].map((name) => element("th", { scope: "col" }, name)));
    const loss = at("text/loss", i);
    const known = Number.isNaN(loss) ? "" : `: loss of the next token ${loss.toFixed(2)} nats`;
    const said = `“${string(at("text/token", i))}” at position ${at("text/pos", i)} of document ${at("text/doc", i)}${known}`;
    $("strip").replaceChildren(element("p", { className: "said" }, said),
      element("div", { className: "wide tall" }, element("table", { className: "strip" }, element("thead", {}, head), body)));
  }

  // --- Choosing -----------------------------------------------------------------------------------------------------

  function choose(layer, expert) {
    const { layers, n_experts } = run();
    state.layer = Math.max(0, Math.min(layers.length - 1, layer));
    state.expert = Math.max(0, Math.min(n_experts[state.layer] - 1, expert || 0));
    drawCard();
    maps.load.frameCell([state.layer, order(state.layer).indexOf(state.expert)]);
    drawDomains();
    tintText();
    after(drawPairs);
  }

  // What is far down the page, and takes longest, waits for the frame that shows the rest.
  let waitingToDraw;
  function after(draw) {
    clearTimeout(waitingToDraw);
    requestAnimationFrame(() => { waitingToDraw = setTimeout(draw); });
  }

  function search() {
    const wanted = $("search").value.replaceAll("·", " ");
    const hits = [];
    if (wanted) {
      for (const kind of ["taken", "predicted"]) {
        const { data, shape } = array(`${kind}/token`);
        const lifts = array(`${kind}/lift`).data;
        const matching = new Set();
        run().strings.forEach((text, number) => { if (text.trim() === wanted.trim() || (wanted.length > 2 && text.includes(wanted))) matching.add(number); });
        data.forEach((token, i) => {
          if (!matching.has(token)) return;
          const expert = Math.floor(i / shape[2]) % shape[1];
          hits.push({ kind, token, lift: lifts[i], expert, layer: Math.floor(i / (shape[1] * shape[2])) });
        });
      }
      hits.sort((a, b) => b.lift - a.lift);
    }
    $("search-said").replaceChildren(...hits.slice(0, 24).map(({ kind, token, lift, expert, layer }) => {
      const name = `${layerName(layer)}, expert ${expert}`;
      const button = element("button", { type: "button", onclick: () => choose(layer, expert) }, name);
      return element("span", {}, string(token).replaceAll(" ", "·"), element("small", {}, ` ${kind === "taken" ? "read" : "predicted"} ${times(lift)}× `), button);
    }));
    if (wanted && !hits.length) $("search-said").append("No expert has it among its first tokens.");
  }

  function chooseRun(r) {
    state.run = r;
    for (const section of document.querySelectorAll("section[data-run]")) section.hidden = Number(section.dataset.run) !== r;
    const { domains, layers } = run();
    const measures = [["load", "load of all text"]];
    if (has("history/load")) measures.push(["training", "load over training"]);
    if (has("importance")) measures.push(["importance", "what masking it costs, over the mean"]);
    if (domains.length > 1) domains.forEach((name, d) => measures.push([`domain ${d}`, `preference for ${name}`]));
    $("measure").replaceChildren(...measures.map(([value, name]) => element("option", { value }, name)));
    if (has("history/load")) {
      state.step = array("history/load_steps").data.length - 1;
      $("step").max = state.step;
      $("step").value = state.step;
    }
    $("layer").replaceChildren(...layers.map((number, i) => element("option", { value: i }, String(number))));
    readPassages();
    choose(state.layer, state.expert);
    drawLoad();
    drawTime();
    drawText();
    search();
  }

  // --- Beginning ----------------------------------------------------------------------------------------------------

  // Tables: a heading sorts; all can be saved.
  for (const table of document.querySelectorAll("table.sorts")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((heading, c) => {
      const button = element("button", { type: "button" }, heading.textContent);
      button.onclick = () => {
        const down = heading.getAttribute("aria-sort") !== "descending";
        for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => { const text = row.cells[c].textContent; const n = parseFloat(text); return Number.isNaN(n) ? text : n; };
        const sign = down ? -1 : 1;
        [...body.rows].sort((a, b) => sign * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0)).forEach((row) => body.append(row));
      };
      heading.replaceChildren(button);
    });
    const text = () => [...table.rows].map((row) => csvLine([...row.cells].map((cell) => cell.textContent))).join("\n");
    table.parentElement.after(saver([["CSV", () => save("table.csv", "text/csv", text())]]));
  }
  for (const figure of document.querySelectorAll("figure")) {
    const name = figure.querySelector("figcaption").textContent.split(/[.?;:]/)[0].slice(0, 40);
    figure.append(saver([
      ["CSV", () => save(`${name}.csv`, "text/csv", figure.dataset.csv)],
      ["SVG", () => save(`${name}.svg`, "image/svg+xml", figure.querySelector("svg").outerHTML)],
    ]));
  }

  $("run").onchange = () => chooseRun(Number($("run").value));
  $("measure").onchange = $("order").onchange = drawLoad;
  $("step").oninput = () => { state.step = Number($("step").value); drawLoad(); };
  $("layer").onchange = () => choose(Number($("layer").value), state.expert);
  $("number").onchange = () => choose(state.layer, Number($("number").value));
  $("pair-kind").onchange = drawPairs;
  $("search").oninput = search;
  $("passage").onchange = drawText;
  $("colour").onchange = tintText;
  $("beside").onchange = () => drawToken();
  const tokenOf = (event) => (event.target.id.startsWith("token-") ? Number(event.target.id.slice(6)) : null);
  $("tokens").addEventListener("pointerover", (event) => {
    const i = tokenOf(event);
    if (i === null) return;
    const lines = run().layers.map((number, layer) => `layer ${number}: ${choice(i, layer).map(([e, w]) => (run().weighted ? `${e} (${percent(w)})` : String(e))).join(", ") || "none"}`);
    tip(event, lines.slice(0, 24).join("\n") + (lines.length > 24 ? "\n…" : ""));
  });
  $("tokens").addEventListener("pointerleave", (event) => tip(event, ""));
  $("tokens").addEventListener("click", (event) => { const i = tokenOf(event); if (i !== null) { state.token = i; drawToken(); } });
  $("tokens").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    const { begin, end } = passages[Number($("passage").value) || 0];
    if (!step) return;
    state.token = Math.max(begin, Math.min(end - 1, state.token + step));
    drawToken();
    $(`token-${state.token}`).scrollIntoView({ block: "nearest" });
    event.preventDefault();
  });
  const redraw = () => { readColours(); drawLoad(); drawDomains(); drawPairs(); drawTime(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 120); });

  readColours();
  chooseRun(0);
  document.documentElement.dataset.ready = "true";
})();
