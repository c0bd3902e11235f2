"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main"), links = document.getElementById("links");
  const SVG = "http://www.w3.org/2000/svg";
  // Pictures are drawn at the width of the page, so that their letters keep their size on a phone.
  const pageWidth = () => Math.max(320, main.clientWidth || 1000);
  function show(v) {
    if (v === null || v === undefined) return "–";
    if (typeof v !== "number" || Number.isInteger(v)) return String(v);
    return Math.abs(v) < 1e-3 ? v.toExponential(2) : Number(v.toPrecision(4)).toString();
  }

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  function draw(tag, attributes = {}, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const shortened = (name, most) => name.length > most ? "…" + name.slice(1 - most) : name;
  function tip(shape, text) { shape.append(draw("title", {}, text)); return shape; }
  function section(title) {
    const id = "s" + main.children.length;
    main.append(element("h2", {id}, title));
    links.append(element("a", {href: "#" + id}, title));
  }
  const heading = title => main.append(element("h3", {}, title));

  // A table: every column sorts, numbers by value with the missing ones last; the search box hides rows.
  function table(rows, columns, choose) {
    const body = element("tbody"), head = element("tr");
    const isText = column => rows.some(row => typeof row[column] === "string");
    const made = rows.map((row, i) => {
      const line = element("tr");
      for (const column of columns) {
        const text = show(row[column]);
        line.append(element("td", {class: (isText(column) ? "text" : "") + (text.length > 40 ? " long" : "")}, text));
      }
      line.dataset.words = columns.map(c => row[c]).filter(v => typeof v === "string").join(" ").toLowerCase();
      if (choose) line.addEventListener("click", () => {
        body.querySelectorAll(".chosen").forEach(other => other.classList.remove("chosen"));
        line.classList.add("chosen");
        choose(row);
      });
      return {row, line, i};
    });
    columns.forEach(column => {
      const cell = element("th", {class: isText(column) ? "text" : "", tabindex: 0, scope: "col"}, column.replaceAll("_", " "));
      const sort = () => {
        const down = cell.getAttribute("aria-sort") === (isText(column) ? "ascending" : "descending") ? isText(column) : !isText(column);
        head.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const sign = down ? -1 : 1;
        made.sort((x, y) => {
          const p = x.row[column], q = y.row[column];
          if (p === null || p === undefined || q === null || q === undefined) return (p ?? null) === (q ?? null) ? x.i - y.i : p === null || p === undefined ? 1 : -1;
          return sign * (typeof p === "string" ? p.localeCompare(q) : p - q) || x.i - y.i;
        });
        body.append(...made.map(m => m.line));
      };
      cell.addEventListener("click", sort);
      cell.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
      head.append(cell);
    });
    body.append(...made.map(m => m.line));
    const box = element("div", {class: "wide"}, element("table", {}, element("thead", {}, head), body));
    main.append(box);
    return box;
  }

  // A picture with one mark for each row along x, in graph order.
  function alongDepth(rows, {title, marks, scale = v => v, unscale = v => v, label}) {
    const values = rows.flatMap(row => marks.map(mark => mark.value(row))).filter(v => typeof v === "number").map(scale);
    if (!values.length) return;
    const high = Math.max(...values), low = Math.min(0, ...values);
    const width = pageWidth(), left = 64;
    const names = 18 + 4.6 * Math.min(20, Math.max(...rows.map(row => row.name.length))), height = 190 + names, bottom = 20 + names;
    const x = i => left + (width - left - 10) * (i + 0.5) / rows.length;
    const y = v => 10 + (height - bottom - 10) * (high - v) / (high - low || 1);
    const picture = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title});
    for (const v of [low, (low + high) / 2, high]) {
      picture.append(draw("line", {x1: left, x2: width - 10, y1: y(v), y2: y(v), class: "axis"}), draw("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "soft"}, show(unscale(v))));
    }
    const every = Math.ceil(rows.length / Math.max(1, Math.floor((width - left) / 16)));
    rows.forEach((row, i) => {
      if (i % every) return;
      const at = `rotate(-55 ${x(i)} ${height - bottom + 14})`;
      picture.append(tip(draw("text", {x: x(i), y: height - bottom + 14, transform: at, "text-anchor": "end", class: "name"}, shortened(row.name, 20)), row.name));
    });
    picture.append(draw("text", {x: left, y: height - 4, class: "soft"}, `${label}; ${rows.length} values in graph order` + (every > 1 ? `, every ${every}th named` : "")));
    const wide = Math.max(1, Math.min(14, (width - left) / rows.length - 1));
    for (const mark of marks) rows.forEach((row, i) => {
      const v = mark.value(row);
      if (typeof v !== "number") return;
      const words = `${row.name}: ${show(v)} ${mark.name}`;
      if (mark.bar) {
        const [top, foot] = [y(Math.max(scale(v), 0)), y(Math.min(scale(v), 0))];
        picture.append(tip(draw("rect", {x: x(i) - wide / 2, y: top, width: wide, height: Math.max(foot - top, 0.5), fill: mark.color}), words));
      } else picture.append(tip(draw("circle", {cx: x(i), cy: y(scale(v)), r: 3, fill: mark.color}), words));
    });
    heading(title);
    const keys = marks.filter(mark => mark.key).map(mark => [mark.key, mark.color]);
    main.append(...(keys.length ? [legend(keys)] : []), picture);
  }

  function legend(keys, lead = "") {
    const line = element("p", {class: "legend"}, lead);
    for (const [name, colour] of keys) line.append(element("span", {style: `background: ${colour}`}), name);
    return line;
  }

  function ranges(rows) {
    const seen = rows.filter(row => row.minimum !== null && row.maximum !== null);
    const root = v => Math.sign(v) * Math.sqrt(Math.abs(v));
    alongDepth(seen, {
      title: "Range seen, and what the scale covers", label: "real value, by its square root", scale: root, unscale: v => Math.sign(v) * v * v,
      marks: [
        {name: "largest covered", key: "covered by the scale", bar: true, color: "var(--cover)", value: row => row.covered ? row.covered[1] : null},
        {name: "smallest covered", bar: true, color: "var(--cover)", value: row => row.covered ? row.covered[0] : null},
        {name: "largest seen", key: "smallest and largest seen", color: "var(--a)", value: row => row.maximum},
        {name: "smallest seen", color: "var(--a)", value: row => row.minimum},
      ],
    });
  }

  function histogram(row, a, b) {
    const width = pageWidth(), picture = draw("svg", {viewBox: `0 0 ${width} 186`, role: "img", "aria-label": `histogram of ${row.name}`});
    const h = row.histogram, high = Math.max(...h.a, ...h.b, 1), bins = h.a.length, wide = (width - 20) / bins;
    const tall = n => n ? Math.max(2, 130 * Math.log1p(n) / Math.log1p(high)) : 0;
    h.a.forEach((n, i) => picture.append(tip(draw("rect", {x: 10 + i * wide, y: 140 - tall(n), width: wide - 1, height: tall(n), fill: "var(--a)", opacity: 0.55}), `${n} of ${a}`)));
    h.b.forEach((n, i) => picture.append(tip(draw("rect", {x: 10 + i * wide + wide / 4, y: 140 - tall(n), width: wide / 2, height: tall(n), fill: "var(--b)", opacity: 0.75}), `${n} of ${b}`)));
    picture.append(draw("text", {x: 10, y: 158, class: "soft"}, show(h.low)), draw("text", {x: width - 10, y: 158, "text-anchor": "end", class: "soft"}, show(h.high)));
    picture.append(draw("text", {x: width / 2, y: 178, "text-anchor": "middle", class: "soft"}, `${shortened(row.name, 30)}: count (log), ${a} wide, ${b} narrow`));
    return picture;
  }

  const COLUMNS = ["name", "operator", "dtype", "scale", "minimum", "maximum", "cosine", "sqnr", "own_sqnr", "mse", "l1", "kl", "max_error", "max_lsb", "own_max_lsb", "saturated", "differing"];
  function comparison(title, c) {
    section(`${title}: ${c.b} against ${c.a}`);
    alongDepth(c.rows, {
      title: "Signal to noise", label: "dB, cut at 120",
      scale: v => Math.min(v, 120),
      marks: [
        {name: "dB accumulated", key: "accumulated", color: "var(--a)", value: row => row.sqnr},
        {name: "dB of the node alone", key: "of the node alone", color: "var(--b)", value: row => row.own_sqnr},
      ],
    });
    ranges(c.rows);
    if (c.rows.some(row => row.saturated)) alongDepth(c.rows, {
      title: "Share of saturated values", label: "share",
      marks: [{name: "saturated", bar: true, color: "var(--b)", value: row => row.saturated}],
    });
    for (const [name, rows] of [["Values", c.rows], ["Weights", c.weights]]) {
      if (!rows.length) continue;
      heading(`${name}: click a row for its distribution`);
      const place = element("div", {class: "place"});
      table(rows, COLUMNS.filter(column => rows.some(row => row[column] !== null)), row => place.replaceChildren(histogram(row, c.a, c.b)));
      place.append(histogram(rows.reduce((w, row) => (row.sqnr ?? 1e9) < (w.sqnr ?? 1e9) ? row : w), c.a, c.b));
      main.append(place);
    }
  }

  function sensitivity(ranking) {
    section("Sensitivity");
    const whole = pageWidth(), side = Math.min(290, 0.45 * whole), letters = Math.floor(side / 6.5) - 9;
    const rows = ranking.rows.slice(0, 40), picture = draw("svg", {viewBox: `0 0 ${whole} ${rows.length * 16 + 10}`, role: "img", "aria-label": "sensitivity ranking"});
    const high = Math.max(...rows.map(row => row.error), 1e-30);
    rows.forEach((row, i) => {
      const width = Math.max(1, (whole - side - 20) * Math.max(row.error, 0) / high);
      picture.append(tip(draw("text", {x: side, y: i * 16 + 15, "text-anchor": "end"}, `${shortened(row.name, letters)} · ${row.dtype}`), row.name));
      picture.append(tip(draw("rect", {x: side + 10, y: i * 16 + 5, width, height: 12, fill: row.kind === "weight" ? "var(--b)" : "var(--a)"}), `${row.kind}, ${ranking.metric} ${show(row.metric)}`));
    });
    main.append(element("p", {class: "note"}, `One quantizer ${ranking.mode === "one_on" ? "on" : "off"} at a time; ${ranking.metric} at the outputs, ${show(ranking.baseline)} with all on. Bars: error.`), legend([["of values", "var(--a)"], ["of weights", "var(--b)"]]), picture);
    table(ranking.rows, ["name", "kind", "operator", "dtype", "metric", "error", "macs", "bytes"]);
  }

  // Rows by depth; drag to move, wheel to zoom.
  function graph(nodes) {
    section("Graph");
    const place = new Map(nodes.map(node => [node.name, node])), colours = {};
    const colour = node => { const key = ["int8", "int16", "int4", "int32"].includes(node.dtype) ? node.dtype : node.dtype.startsWith("float") ? "float" : "exact"; colours[key] = true; return `var(--${key})`; };
    const X = node => node.column * 190, Y = node => node.depth * 46;
    const inner = draw("g"), picture = draw("svg", {role: "img", "aria-label": "graph", viewBox: "-100 -30 1000 520"});
    for (const node of nodes) for (const name of node.inputs) {
      const from = place.get(name);
      if (from) inner.append(draw("path", {d: `M${X(from)} ${Y(from) + 15} C${X(from)} ${Y(from) + 32} ${X(node)} ${Y(node) - 32} ${X(node)} ${Y(node) - 15}`}));
    }
    for (const node of nodes) {
      inner.append(tip(draw("rect", {x: X(node) - 88, y: Y(node) - 15, width: 176, height: 30, rx: 4, fill: colour(node)}), `${node.name}: ${node.operator}, ${node.dtype}`));
      inner.append(draw("text", {x: X(node), y: Y(node) - 2, "text-anchor": "middle"}, node.name.length > 28 ? "…" + node.name.slice(-27) : node.name), draw("text", {x: X(node), y: Y(node) + 10, "text-anchor": "middle"}, `${node.operator} · ${node.dtype}`));
    }
    picture.append(inner);
    let view = [-400, -30, 1000, 520], from = null;
    const apply = () => picture.setAttribute("viewBox", view.join(" "));
    picture.addEventListener("wheel", event => {
      event.preventDefault();
      const box = picture.getBoundingClientRect(), factor = event.deltaY > 0 ? 1.15 : 1 / 1.15;
      const px = view[0] + view[2] * (event.clientX - box.left) / box.width, py = view[1] + view[3] * (event.clientY - box.top) / box.height;
      view = [px - (px - view[0]) * factor, py - (py - view[1]) * factor, view[2] * factor, view[3] * factor];
      apply();
    }, {passive: false});
    picture.addEventListener("pointerdown", event => { from = [event.clientX, event.clientY, ...view]; picture.setPointerCapture(event.pointerId); });
    picture.addEventListener("pointermove", event => {
      if (!from) return;
      const box = picture.getBoundingClientRect();
      view = [from[2] - (event.clientX - from[0]) * view[2] / box.width, from[3] - (event.clientY - from[1]) * view[3] / box.height, view[2], view[3]];
      apply();
    });
    picture.addEventListener("pointerup", () => { from = null; });
    apply();
    const keys = Object.keys(colours).map(key => [key, `var(--${key})`]);
    main.append(legend(keys, "drag to move, wheel to zoom"), element("div", {class: "wide graph"}, picture));
  }

  const sentence = words => words[0].toUpperCase() + words.slice(1) + ".";
  function nextSteps(steps) {
    section("What to do next");
    const list = element("ol", {class: "steps"});
    for (const step of steps) {
      const line = element("li", {}, element("b", {}, step.where), ` (${show(step.level)} dB of its own): ${sentence(step.why)} ${sentence(step.do)}`);
      if (step.rule) line.append(element("pre", {}, step.rule));
      list.append(line);
    }
    main.append(element("p", {class: "note"}, "The worst values first. Put one rule at the end of the settings file, calibrate, and compare again: what it gains is not known before."), list);
  }

  function search() {
    const wanted = document.getElementById("search").value.toLowerCase();
    document.querySelectorAll("tbody tr").forEach(line => { line.hidden = !line.dataset.words.includes(wanted); });
  }

  function render() {
    main.replaceChildren();
    links.replaceChildren();
    if (data.summary.length) { section("Summary"); table(data.summary, Object.keys(data.summary[0])); }
    if (data.steps.length) nextSteps(data.steps);
    if (data.findings.length) { section("Findings"); table(data.findings, ["level", "check", "where", "message", "fix"]); }
    for (const [title, c] of Object.entries(data.comparisons)) comparison(title, c);
    if (data.sensitivity) sensitivity(data.sensitivity);
    if (data.graph) graph(data.graph);
    search();
    drawn = main.clientWidth;
  }

  let drawn = 0, waiting = 0;
  render();
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (main.clientWidth !== drawn) render(); }, 200);
  });
  document.getElementById("search").addEventListener("input", search);
})();
