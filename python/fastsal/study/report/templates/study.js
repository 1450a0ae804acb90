"use strict";
(() => {
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/−/g, "-").replace(/,/g, ""));
    return { text, number };
  };
  const compare = (a, b) => {
    if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return Number.isNaN(a.number) ? 1 : -1;
    return a.number - b.number || a.text.localeCompare(b.text, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const numeric = head.classList.contains("num");
        const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: value(row, column) }));
        const order = numeric
          ? (a, b) => compare(a.key, b.key)
          : (a, b) => a.key.text.localeCompare(b.key.text, "en", { numeric: true });
        rows.sort((a, b) => (down ? -order(a, b) : order(a, b)));
        table.tBodies[0].append(...rows.map((item) => item.row));
      });
    });
  }
  for (const item of document.querySelectorAll(".legend li")) {
    const key = item.dataset.toggle;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.title = "Show or hide this criterion in all figures";
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      const hide = button.getAttribute("aria-pressed") === "true";
      for (const other of document.querySelectorAll(`.legend [data-toggle="${key}"] button`)) {
        other.setAttribute("aria-pressed", String(!hide));
      }
      for (const group of document.querySelectorAll(`.panels [data-m="${key}"]`)) {
        group.classList.toggle("off", hide);
      }
    });
  }
  const form = document.querySelector(".filter");
  if (form) {
    const rows = [...document.querySelectorAll(".all tbody tr")];
    const texts = rows.map((row) => [...row.cells].map((c) => c.textContent).join(" ").toLowerCase());
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      const words = form.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !words.every((word) => texts[i].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      form.querySelector("output").textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
  }
})();
