// Shows the numbers of the chosen token, or of the chosen heads if no token is chosen.

const LISTED = 12; // entries of a list; the text shows the others by colour

class Panel {
  // `words` has the tokens of queries and keys; `onOther(place, isPressed)` a second one.
  constructor(numbers, words, onOther) {
    Object.assign(this, { numbers, words, onOther, box: byId("panel") });
  }

  word(kind, at) {
    const word = make("span", { className: "word", textContent: spoken(this.words[kind][at]) });
    word.append(make("small", { textContent: at }));
    return word;
  }

  // Makes a list of tokens with a bar and a number each; a full bar stands for `total`.
  list(kind, found, colour, amount, total) {
    const items = found.slice(0, LISTED).map(([at, weight]) => {
      const bar = make("b", { className: `${colour}-colour` });
      bar.style.width = `${Math.min(100 * weight / total, 100)}%`;
      const button = make("button", { type: "button" }, this.word(kind, at),
        make("span", { className: "line" }, bar),
        make("span", { className: "amount", textContent: amount(weight) }));
      button.addEventListener("pointerenter", () => this.onOther({ kind, at }, false));
      button.addEventListener("focus", () => this.onOther({ kind, at }, false));
      button.addEventListener("click", () => this.onOther({ kind, at }, true));
      return make("li", {}, button);
    });
    const list = make("ul", { className: "found" }, ...items);
    if (found.length <= LISTED) return [list];
    const more = `and ${found.length - LISTED} more, less than these`;
    return [list, make("p", { className: "note", textContent: more })];
  }

  heading(text, colour) {
    const dot = make("span", { className: `dot ${colour}-colour` });
    return make("h3", {}, dot, text);
  }

  note(text) { return make("p", { className: "note", textContent: text }); }

  // Shows the picture of the chosen heads, and the tokens that receive most.
  showHeads(slots) {
    const parts = [];
    this.box.classList.add("idle");
    const chosen = slots.length > 1 ? `mean of ${slots.length} heads` : this.numbers.name(slots[0]);
    parts.push(make("p", { className: "name", textContent: hasText ? "All tokens" : chosen }));
    if (this.numbers.hasWeights) parts.push(this.note("Point at a token, or tap it, to see what it attends to."));
    if (facts.entropy) {
      const means = slots.map((slot) => facts.entropy.mean[slot]);
      const mean = means.reduce((x, y) => x + y, 0) / means.length;
      parts.push(this.note(`A token ${spreadOver(mean)}: entropy ${short(mean)} nats, mean over tokens.`));
    }
    if (facts.cells) parts.push(...this.picture(slots));
    const name = facts.received ? "received" : "entropy";
    if (this.words.key.length > 1) parts.push(...this.most(name, slots));
    this.box.replaceChildren(...parts);
  }

  most(name, slots) {
    const kind = name === "received" ? "key" : "query", length = this.words[kind].length;
    const found = Array.from({ length }, (_, at) => [at, this.numbers.of(name, slots, at)]);
    const known = found.filter(([, amount]) => amount > 0).sort((a, b) => b[1] - a[1]);
    if (!known.length) return [];
    const label = name === "received" ? "Receives most (in queries)" : "Spreads most (nats)";
    const listed = known.slice(0, LISTED);
    return [this.heading(label, "base"), ...this.list(kind, listed, "base", short, listed[0][1])];
  }

  // Draws the weights of the chosen heads in cells of some queries by some keys.
  picture(slots) {
    const canvas = make("canvas"), [rows, columns] = facts.cells;
    const colours = [colourOf("base"), colourOf("none")];
    drawPicture(canvas, this.numbers.picture(slots), facts.cells, ...colours);
    const box = make("div", { className: "picture", title: "queries downwards, keys across" }, canvas);
    box.addEventListener("click", (event) => {
      const place = box.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientY - place.top) / place.height, 0), 0.999);
      const at = Math.min(Math.floor(share * rows * facts.cell[0]), facts.T - 1);
      this.onOther({ kind: "query", at, isJump: true }, true);
    });
    const cell = facts.cell.join(" × ");
    const size = cell === "1 × 1" ? "" : ` One cell: ${cell} tokens.`;
    return [box, this.note(`Queries downwards, keys across.${size}`)];
  }

  // Shows what a token attends to, what attends to it, and both sums.
  showToken({ kind, at }, slots, out, into, isPinned) {
    this.box.classList.remove("idle");
    const words = this.words[kind === "key" ? "key" : "query"];
    const name = make("p", { className: "name", textContent: spoken(words[at]) });
    name.append(make("small", { className: "note", textContent: `  token ${at}` }));
    // Leaves room for what `showPair` writes, so that nothing below it moves.
    this.pair = make("div", { className: "pair" });
    const lists = make("div", { className: "lists" });
    if (kind !== "key") lists.append(make("div", {}, ...this.outgoing(at, slots, out)));
    if (kind !== "query") lists.append(make("div", {}, ...this.incoming(at, slots, into)));
    this.box.replaceChildren(name, this.pair, lists);
    this.pair.hidden = !isPinned || !this.numbers.hasWeights;
  }

  outgoing(at, slots, out) {
    if (!facts.entropy) return [];
    const spread = this.numbers.of("entropy", slots, at);
    if (!this.numbers.hasWeights) return [this.note(`${spreadOver(spread)}: entropy ${short(spread)} nats`)];
    const parts = [this.heading("Attends to", "out")];
    if (Number.isNaN(spread)) return [...parts, this.note("Its weights are not numbers.")];
    if (!out.length) return [...parts, this.note("It sees no key.")];
    parts.push(...this.list("key", out, "out", percent, Math.max(out[0][1], 0.5)));
    const rest = 1 - out.reduce((sum, [, weight]) => sum + weight, 0);
    const sink = facts.sink ? ["goes to the sink"] : [], small = facts.complete ? [] : ["is too small for this page"];
    const where = [...sink, ...small].join(" or ");
    if (rest > 0.005 && where) parts.push(this.note(`The rest, ${percent(rest)}, ${where}.`));
    return parts;
  }

  incoming(at, slots, into) {
    if (!facts.received) return [];
    const received = this.numbers.of("received", slots, at);
    const sum = `It receives ${short(received)}, the sum over all queries.`;
    if (!this.numbers.hasWeights) return [this.note(sum)];
    const parts = [this.heading("Is attended to by", "in")];
    if (into.length) parts.push(...this.list("query", into, "in", percent, Math.max(into[0][1], 0.5)));
    return [...parts, this.note(sum)];
  }

  // Shows how much one token attends to another in the chosen heads, and where most.
  showPair(pair, slots) {
    if (!pair) {
      this.pair.replaceChildren(this.note("Point at a second token, or choose one from a list, to compare all heads."));
      return;
    }
    const { query, key } = pair, words = this.words;
    const all = this.numbers.slots.map((_, slot) => [slot, this.numbers.weight(slot, query, key)]);
    const mean = slots.reduce((sum, slot) => sum + (all[slot][1] || 0), 0) / slots.length;
    const heads = all.filter(([slot, weight]) => weight && this.numbers.slots[slot].head !== null);
    heads.sort((a, b) => b[1] - a[1]);
    const names = `${spoken(words.query[query])} → ${spoken(words.key[key])}`;
    const listed = heads.slice(0, 3).map(([slot, weight]) =>
      make("li", { textContent: `${this.numbers.name(slot)}: ${percent(weight)}` }));
    const lead = listed.length ? "The most in all heads:" : "No head has a weight for this pair here.";
    this.pair.replaceChildren(this.heading(`${names}: ${percent(mean)}`, "base"), this.note(lead),
      make("ul", { className: "found" }, ...listed));
  }
}
