"use strict";
(() => {
  const block = document.getElementById("data");
  const data = block ? JSON.parse(block.textContent) : { tables: {}, frames: {} };
  const clean = (text) => text.replace(/[,\s\u00a0]/g, "").replace("\u2212", "-");

  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  // The state of the view lives in the fragment, after the section (#table&layers=final.desc&step=120), so that a link
  // keeps it. It never reaches a server, and a page opened as a file has it too.
  const state = new Map();
  let place = "";
  const readState = () => {
    state.clear();
    place = "";
    for (const part of location.hash.slice(1).split("&").filter(Boolean)) {
      const cut = part.indexOf("=");
      try {
        if (cut < 0) place = decodeURIComponent(part);
        else state.set(decodeURIComponent(part.slice(0, cut)), decodeURIComponent(part.slice(cut + 1)));
      } catch (damaged) {
        // A link that was cut in the middle of an escape: the rest of it still counts.
      }
    }
  };
  const writeState = () => {
    const parts = [...state].map(([key, value]) => `${encodeURIComponent(key)}=${encodeURIComponent(value)}`);
    const text = [...(place ? [encodeURIComponent(place)] : []), ...parts].join("&");
    try {
      history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
    } catch (refused) {
      // A page opened from an archive or a sandbox may not change its address; everything else still works.
    }
  };
  const remember = (key, value) => {
    value ? state.set(key, value) : state.delete(key);
    writeState();
  };
  const appliers = [];
  // Saving

  const save = (name, kind, content) => {
    const link = make("a", { href: URL.createObjectURL(new Blob([content], { type: kind })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const copy = async (text, button, node) => {
    const said = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch (refused) {
      if (node) getSelection().selectAllChildren(node);
      button.textContent = node ? "Selected" : "Refused";
    }
    setTimeout(() => { button.textContent = said; }, 1600);
  };
  const button = (text, label, act) => {
    const made = make("button", { type: "button", className: "copy", textContent: text });
    made.setAttribute("aria-label", label);
    made.addEventListener("click", () => act(made));
    return made;
  };
  // A name that a spreadsheet would run as a formula gets a quote before it.
  const cell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@]/.test(text)) text = "'" + text;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (rows) => rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
  const content = (table) => [...table.rows].map((row) => [...row.cells].map((one) => {
    const text = one.textContent.trim();
    return text !== "" && /^-?[\d.]+(e[+-]?\d+)?$/.test(clean(text)) ? Number(clean(text)) : text;
  }));
  const records = ({ columns, rows }) => JSON.stringify(
    rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, row[i]]))), null, 1);

  // Tables: sort, filter, save

  const { compare } = new Intl.Collator("en", { numeric: true });
  const number = (one) => {
    const value = parseFloat(one.dataset.value ?? clean(one.textContent));
    return Number.isNaN(value) ? null : value;
  };
  const sortable = (table) => {
    const { name } = table.dataset;
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    const tools = document.querySelector(`[data-for="${table.id}"]`);
    const input = tools.querySelector("input");
    const status = tools.querySelector("[role=status]");
    const texts = original.map((row) => row.textContent.toLowerCase());
    let sorted = "";
    let order = original.map((row, i) => [row, null, texts[i]]);
    let most = 400; // rows that are laid out at first: a browser takes long for thousands

    const apply = () => {
      const wanted = state.get(name) || "";
      if (wanted !== sorted) {
        const [key, way] = wanted.split(".");
        const column = heads.findIndex((head) => head.dataset.key === key);
        heads.forEach((head) => head.removeAttribute("aria-sort"));
        heads[column]?.setAttribute("aria-sort", way === "desc" ? "descending" : "ascending");
        const numeric = heads[column]?.dataset.kind === "number";
        const sign = way === "desc" ? -1 : 1;
        order = original.map((row, i) => {
          const one = row.cells[column];
          return [row, !one ? null : numeric ? number(one) : one.textContent.trim(), texts[i]];
        });
        order.sort(([, x], [, y]) => {
          if (x === null || y === null) return (x === null) - (y === null);
          return sign * (numeric ? x - y : compare(x, y));
        });
        body.replaceChildren(...order.map(([row]) => row));
        sorted = wanted;
      }
      input.value = state.get(`${name}.find`) || "";
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let found = 0;
      for (const [row, , text] of order) row.hidden = !(words.every((word) => text.includes(word)) && found++ < most);
      const some = Math.min(found, most) < original.length;
      status.textContent = some ? `${Math.min(found, most)} of ${original.length} shown` : "";
      all.hidden = found <= most;
    };

    const all = button("Show all", `Show all rows of table ${name}`, () => { most = Infinity; apply(); });
    heads.forEach((head) => {
      const inside = make("button", { type: "button" }, ...head.childNodes);
      head.append(inside);
      inside.addEventListener("click", () => {
        const { key, kind } = head.dataset;
        const ways = kind === "number" ? ["desc", "asc", ""] : ["asc", "desc", ""];
        const way = ways[(ways.indexOf(sorted.startsWith(`${key}.`) ? sorted.split(".")[1] : "") + 1) % 3];
        remember(name, way && `${key}.${way}`);
        apply();
      });
    });
    input.addEventListener("input", () => {
      remember(`${name}.find`, input.value);
      apply();
    });
    const [columns, ...rows] = content(table);
    const full = data.tables[table.dataset.rows] || { columns, rows };
    const text = () => csv([full.columns, ...full.rows]);
    tools.append(
      all,
      button("Copy CSV", `Copy table ${name} as CSV`, (pressed) => copy(text(), pressed)),
      button("CSV", `Download table ${name} as CSV`, () => save(`${name}.csv`, "text/csv", text())),
      button("JSON", `Download table ${name} as JSON`, () => save(`${name}.json`, "application/json", records(full))),
    );
    tools.hidden = false;
    appliers.push(apply);
  };

  // Figures: the step of a map, the values under pointer and keyboard, saving

  const paint = (figure, ranks, top, last) => {
    for (const node of figure.querySelectorAll("[data-cell]")) {
      const value = ranks[node.dataset.cell];
      const level = top > 0 ? Math.min(15, Math.round(value / top * 15)) : 0;
      const [shape] = node.children;
      if (shape.localName === "text") {
        shape.textContent = value;
        shape.style.fill = value ? `var(--on${level})` : "var(--ink)";
      } else {
        shape.style.fill = value ? `var(--level${level})` : "none";
        shape.style.stroke = value ? "none" : "var(--muted)";
        shape.style.strokeDasharray = "2 2";
      }
    }
    // The means at the edges are those of the last step.
    for (const node of figure.querySelectorAll(".mean")) node.style.visibility = last ? "" : "hidden";
  };
  const timed = (figure) => {
    const { steps, ranks, top } = data.frames[figure.dataset.cells] || { steps: [] };
    if (steps.length < 2) return;
    const key = `step${figure.dataset.cells.replace("layers", "")}`;
    const end = steps.length - 1;
    const input = make("input", { type: "range", min: 0, max: end, step: 1, value: end });
    const out = make("output");
    let drawn = end;
    const apply = () => {
      const wanted = state.has(key) ? steps.findLastIndex((step) => step <= Number(state.get(key))) : end;
      const at = Math.max(0, wanted);
      const all = ranks[at].reduce((sum, rank) => sum + rank, 0).toLocaleString("en");
      input.value = at;
      out.textContent = `step ${steps[at].toLocaleString("en")}: ${all} ranks`;
      input.setAttribute("aria-valuetext", out.textContent);
      figure.dataset.at = at;
      if (at !== drawn) paint(figure, ranks[at], top, at === end);
      drawn = at;
    };
    input.addEventListener("input", () => {
      remember(key, Number(input.value) === end ? "" : String(steps[input.value]));
      apply();
    });
    figure.prepend(make("div", { className: "time" }, make("label", {}, "Training time ", input), out));
    appliers.push(apply);
  };
  const hinted = (figure) => {
    const table = data.tables[figure.dataset.cells];
    const scroll = figure.querySelector(".scroll");
    const cells = [...figure.querySelectorAll("[data-cell]:has(path)")];
    if (!table || !cells.length) return;
    const hint = make("p", { className: "hint small", textContent: "Point at a cell, or use the arrow keys." });
    hint.setAttribute("role", "status");
    scroll.after(hint);
    let current;
    const show = (node, follow) => {
      if (!node || node === current) return;
      current?.classList.remove("at");
      current = node;
      node.classList.add("at");
      const row = table.rows[node.dataset.cell];
      const frames = data.frames[figure.dataset.cells];
      const now = figure.dataset.at && frames ? `, rank now ${frames.ranks[figure.dataset.at][node.dataset.cell]}` : "";
      const said = table.said.map((name) => [name, row[table.columns.indexOf(name)]])
        .filter(([, value]) => value !== null)
        .map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "number" ? +value.toFixed(4) : value}`);
      hint.textContent = `${row[0]}: ${said.join(", ")}${now}`;
      if (follow) node.scrollIntoView({ block: "nearest", inline: "nearest" });
    };
    scroll.addEventListener("pointerover", (event) => {
      const found = event.target.closest("[data-cell]");
      show(found && cells.find((node) => node.dataset.cell === found.dataset.cell));
    });
    scroll.addEventListener("keydown", (event) => {
      const arrows = { ArrowRight: [1], ArrowLeft: [-1], ArrowDown: [1, 1], ArrowUp: [-1, 1] };
      const [step, upright] = arrows[event.key] || [];
      if (!step) return;
      event.preventDefault();
      const left = (node) => node.getBoundingClientRect().left;
      const line = upright && current ? cells.filter((node) => Math.abs(left(node) - left(current)) < 2) : cells;
      show(line[current ? line.indexOf(current) + step : 0], true);
    });
  };
  const drawing = (figure) => {
    const source = figure.querySelector("svg");
    const copied = source.cloneNode(true);
    const colours = getComputedStyle(document.documentElement);
    const value = (name) => colours.getPropertyValue(name).trim();
    const [, , wide, high] = source.getAttribute("viewBox").split(" ").map(Number);
    Object.entries({ xmlns: "http://www.w3.org/2000/svg", width: wide / 0.75, height: high / 0.75, style: "" })
      .forEach(([name, to]) => copied.setAttribute(name, to));
    copied.insertAdjacentHTML("afterbegin", `<rect width="100%" height="100%" fill="${value("--surface")}"/>`);
    copied.querySelectorAll(".at").forEach((node) => node.classList.remove("at"));
    const text = new XMLSerializer().serializeToString(copied)
      .replace(/var\((--[\w-]+)\)/g, (_, name) => value(name).replaceAll('"', "'"));
    return { text, wide: wide / 0.75, high: high / 0.75 };
  };
  const picture = (figure, name) => {
    const { text, wide, high } = drawing(figure);
    const image = new Image();
    image.addEventListener("load", () => {
      const scale = Math.min(2, 16000 / Math.max(wide, high));
      const canvas = make("canvas", { width: wide * scale, height: high * scale });
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(`${name}.png`, "image/png", blob));
    });
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  };
  const saved = (figure) => {
    const name = figure.id.replace("figure-", "");
    const table = figure.querySelector("table");
    figure.querySelector("figcaption").after(make("div", { className: "saving" },
      button("SVG", `Download figure ${name} as SVG`, () => save(`${name}.svg`, "image/svg+xml", drawing(figure).text)),
      button("PNG", `Download figure ${name} as PNG`, () => picture(figure, name)),
      button("CSV", `Download the numbers of figure ${name} as CSV`,
        () => save(`${name}.csv`, "text/csv", csv(content(table)))),
    ));
  };

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("figure").forEach((figure) => {
    if ("timed" in figure.dataset) timed(figure);
    if (figure.dataset.cells) hinted(figure);
    saved(figure);
  });
  document.querySelectorAll("button.copy[data-copy]").forEach((one) => {
    one.hidden = false;
    const node = document.getElementById(one.dataset.copy);
    one.addEventListener("click", () => copy(node.textContent, one, node));
  });

  const arrive = () => {
    const kept = new Map(state);
    readState();
    if (!state.size && place) for (const [key, value] of kept) state.set(key, value);
    appliers.forEach((apply) => apply());
    writeState();
  };
  arrive();
  if (state.size && place) document.getElementById(place)?.scrollIntoView();
  addEventListener("hashchange", arrive);
})();
