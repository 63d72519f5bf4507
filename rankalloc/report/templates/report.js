"use strict";
(() => {
  const query = new URLSearchParams(location.search);

  // Sort and filter live in the query (?layers=final.desc&layers.find=query), so a link keeps the view.
  const remember = (key, value) => {
    value ? query.set(key, value) : query.delete(key);
    const text = query.toString();
    try {
      history.replaceState(null, "", location.pathname + (text ? "?" + text : "") + location.hash);
    } catch (refused) {
      // A page opened from an archive or a sandbox may not change its address; sorting still works.
    }
  };

  const sortable = (table) => {
    const name = table.dataset.name;
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    const tools = document.querySelector(`[data-for="${table.id}"]`);
    const input = tools.querySelector("input");
    const status = tools.querySelector("[role=status]");
    let sort = "";

    const value = (row, column, kind) => {
      const cell = row.cells[column];
      if (kind !== "number") return cell.textContent.trim();
      const text = cell.dataset.value;
      return text === "" || text === undefined ? null : Number(text);
    };

    const apply = () => {
      const [key, way] = sort.split(".");
      const column = heads.findIndex((head) => head.dataset.key === key);
      const rows = [...original];
      heads.forEach((head, i) => {
        if (i === column) head.setAttribute("aria-sort", way === "desc" ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      if (column >= 0) {
        const kind = heads[column].dataset.kind;
        const sign = way === "desc" ? -1 : 1;
        rows.sort((a, b) => {
          const x = value(a, column, kind);
          const y = value(b, column, kind);
          if (x === null || y === null) return (x === null) - (y === null);
          return sign * (kind === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
        });
      }
      body.append(...rows);
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      status.textContent = words.length ? `${shown} of ${rows.length} shown` : "";
    };

    heads.forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const key = head.dataset.key;
        const first = head.dataset.kind === "number" ? "desc" : "asc";
        const second = first === "desc" ? "asc" : "desc";
        sort = sort === `${key}.${first}` ? `${key}.${second}` : sort === `${key}.${second}` ? "" : `${key}.${first}`;
        remember(name, sort);
        apply();
      });
    });
    input.addEventListener("input", () => {
      remember(`${name}.find`, input.value);
      apply();
    });
    tools.hidden = false;
    sort = query.get(name) || "";
    input.value = query.get(`${name}.find`) || "";
    apply();
  };

  document.querySelectorAll("table.sortable").forEach(sortable);

  const select = (node) => {
    const range = document.createRange();
    range.selectNodeContents(node);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };

  document.querySelectorAll("button.copy").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const node = document.getElementById(button.dataset.copy);
      let done = false;
      try {
        await navigator.clipboard.writeText(node.textContent);
        done = true;
      } catch (refused) {
        select(node);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Selected";
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  });
})();
