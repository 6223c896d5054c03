// The map of all layers and heads: a grid of buttons with a small picture or a number each.

class HeadMap {
  constructor(numbers, onChoose) {
    this.numbers = numbers;
    this.onChoose = onChoose;
    this.cells = [];
    this.build();
    const { map } = this;
    map.addEventListener("click", (event) => {
      const cell = event.target.closest(".cell");
      if (cell) this.press(Number(cell.value), event);
    });
    map.addEventListener("keydown", (event) => this.move(event));
  }

  build() {
    const most = Math.max(...facts.heads), mean = most > 1;
    this.map = byId("map");
    const wide = hasText ? Math.min(440, 0.29 * innerWidth) : Math.min(900, 0.6 * innerWidth);
    const room = innerWidth <= 640 ? innerWidth - 80 : wide;
    const size = Math.min(64, Math.max(20, Math.floor(room / (most + mean)) - 2));
    this.size = size;
    this.map.style.setProperty("--cell", `${size}px`);
    this.map.style.gridTemplateColumns = `auto repeat(${most}, ${size}px)${mean ? " auto" : ""}`;
    const heading = (text) => make("span", { role: "columnheader", textContent: text });
    const names = [...Array(most).keys()].map((head) => heading(head));
    const header = make("div", { role: "row" }, heading(""), ...names);
    if (mean) header.append(heading("mean"));
    this.map.replaceChildren(header);
    let slot = 0;
    facts.heads.forEach((count, layer) => {
      const name = make("span", { role: "rowheader", textContent: layer });
      name.setAttribute("aria-label", `layer ${layer}`);
      const row = make("div", { role: "row" }, name);
      for (let head = 0; head < count; head++) row.append(this.cell(slot++, ""));
      for (let head = count; head < most; head++) row.append(make("span"));
      const last = this.cell(slot++, "mean");
      if (mean) row.append(last);
      this.map.append(row);
    });
  }

  cell(slot, kind) {
    const cell = make("button", { type: "button", className: `cell ${kind}`, value: slot });
    cell.setAttribute("role", "gridcell");
    cell.tabIndex = -1;
    this.cells.push(cell);
    return cell;
  }

  // A press chooses a head. With a key held down, or "several" checked, it adds a head.
  press(slot, event) {
    const adds = event.ctrlKey || event.metaKey || event.shiftKey || byId("several").checked;
    if (!adds) return this.onChoose([slot]);
    const others = this.chosen.filter((other) => other !== slot);
    if (others.length === this.chosen.length) others.push(slot);
    return this.onChoose(others.length ? others : [slot]);
  }

  move(event) {
    const cell = event.target.closest(".cell");
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!cell || !(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key], rows = [...this.map.children].slice(1);
    const inRow = (row) => [...row.querySelectorAll(".cell")];
    const row = rows.indexOf(cell.parentElement), column = inRow(cell.parentElement).indexOf(cell);
    const target = rows[row + down] && inRow(rows[row + down])[column + right];
    if (!target) return;
    this.onChoose([Number(target.value)]);
    target.focus({ preventScroll: false });
  }

  choose(slots) {
    this.chosen = slots;
    this.cells.forEach((cell, slot) => {
      cell.setAttribute("aria-selected", String(slots.includes(slot)));
      cell.tabIndex = slot === slots[slots.length - 1] ? 0 : -1;
    });
  }

  // Fills the cells with pictures, or with a number and its share of the largest number.
  draw(mode, pair) {
    const colour = colourOf("base"), none = colourOf("none");
    this.cells.forEach((cell, slot) => {
      const name = this.numbers.name(slot);
      cell.classList.toggle("shaded", mode !== "pictures");
      if (mode === "pictures") {
        const canvas = cell.querySelector("canvas") || make("canvas");
        drawPicture(canvas, this.numbers.picture([slot]), facts.cells, colour, none);
        cell.replaceChildren(canvas);
        cell.said = null;
        cell.title = name;
        cell.setAttribute("aria-label", `${name}, ${spreadOver(facts.entropy.mean[slot])}`);
        return;
      }
      const [share, text, said] = this.amount(mode, slot, pair);
      if (cell.said === said) return; // most cells stay as they are: most heads have no weight for most pairs
      cell.said = said;
      cell.style.setProperty("--w", shade(share));
      cell.replaceChildren(...(this.size >= 30 && text ? [make("span", { textContent: text })] : []));
      cell.title = `${name}: ${said}`;
      cell.setAttribute("aria-label", cell.title);
    });
  }

  // Gives for one slot the share of the largest number, the number, and a text.
  amount(mode, slot, pair) {
    if (mode === "entropy") {
      const mean = facts.entropy.mean[slot], top = Math.max(...facts.entropy.mean, 1e-9);
      if (mean === null) return [0, "?", "not a number"];
      return [(mean / top) ** 2, mean.toFixed(mean < 9.95 ? 1 : 0), spreadOver(mean)];
    }
    if (mode === "received") {
      // The share of all weight that goes to the key that receives most.
      const total = facts.received.mean[slot] * facts.S;
      const share = total ? facts.received.top[slot] / total : 0;
      return [share, Math.round(100 * share), `${percent(share)} go to one token`];
    }
    const weight = pair ? this.numbers.weight(slot, pair.query, pair.key) : 0;
    if (weight === null) return [0, "", "too little to be on this page"];
    return [weight, weight >= 0.01 ? Math.round(100 * weight) : "", percent(weight)];
  }
}
