// Shows the tokens as a text: one if queries and keys have the same tokens, otherwise two.

const MARKS = /^[ \u0120\u2581]+/; // a space, and the signs that tokenizers write for it
const NEWLINE = /^[\n\u010a]+$/;

// Says whether tokens are pieces of a text, which contain its spaces, and not words.
const arePieces = (tokens) => tokens.some((token) => MARKS.test(token) || /\s$|\u010a/.test(token));

// Gives the text of a token, and whether a gap comes before it or a line ends after it.
function written(token, isPieces) {
  if (NEWLINE.test(token)) return { text: "⏎", gap: false, ends: true, sign: true };
  const gap = isPieces ? MARKS.test(token) : !token.startsWith("##"); // BERT marks a piece inside a word by ##
  let text = isPieces ? token.replace(MARKS, "") : token;
  const escaped = (x) => x === "\n" ? "⏎" : `\\x${x.codePointAt(0).toString(16).padStart(2, "0")}`;
  text = text.replace(/[\u0000-\u001f\u007f-\u009f]/g, escaped);
  if (text.trim() === "") return { text: token === "" ? "∅" : "␣", gap, sign: true };
  return { text, gap, ends: isPieces && token.endsWith("\n"), sign: false };
}

// Gives the text of a token in a list or a sentence.
const spoken = (token) => written(token, true).text;

class Side {
  // `kind` is "both", "query" or "key".
  constructor(kind, tokens, heading) {
    this.kind = kind;
    this.tokens = tokens;
    const isPieces = arePieces(tokens);
    this.box = make("div", { className: `tokens ${tokens.length > 300 ? "long" : tokens.length > 80 ? "" : "brief"}`, role: "listbox", tabIndex: 0, id: `tokens-${kind}` });
    this.box.setAttribute("aria-label", heading);
    this.elements = tokens.map((token, at) => this.element(token, at, isPieces));
    const title = kind === "both" ? [] : [make("h3", { textContent: heading })];
    byId("sides").append(make("div", { className: "side" }, ...title, this.box));
    this.at = 0;
  }

  element(token, at, isPieces) {
    const { text, gap, ends, sign } = written(token, isPieces);
    const element = make("span", { className: "token", textContent: text, id: `${this.kind}-${at}` });
    element.setAttribute("role", "option");
    element.setAttribute("aria-selected", "false");
    element.dataset.at = at;
    if (sign) element.classList.add("sign");
    // A line may break before each token. A space at a break takes no room.
    const isAfterSpace = at > 0 && isPieces && this.tokens[at - 1].endsWith(" ");
    this.box.append(gap || isAfterSpace ? " " : make("wbr"), element);
    if (ends) this.box.append(make("br"));
    return element;
  }

  // Tells `onLook(place, isPressed)` where the pointer or the keyboard is; null if nowhere.
  listen(onLook) {
    const place = (event) => {
      const element = event.target.closest && event.target.closest(".token");
      return element ? { kind: this.kind, at: Number(element.dataset.at) } : null;
    };
    this.box.addEventListener("pointerover", (event) => {
      if (event.pointerType !== "touch") onLook(place(event), false);
    });
    this.box.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") onLook(null, false);
    });
    this.box.addEventListener("click", (event) => {
      const found = place(event);
      if (found) this.at = found.at;
      onLook(found, true);
    });
    this.box.addEventListener("keydown", (event) => this.key(event, onLook));
    this.box.addEventListener("focus", () => {
      if (this.box.matches(":focus-visible")) this.mark(this.at);
    });
    this.box.addEventListener("blur", () => this.mark(null));
  }

  key(event, onLook) {
    const last = this.elements.length - 1;
    const to = {
      ArrowLeft: () => Math.max(this.at - 1, 0),
      ArrowRight: () => Math.min(this.at + 1, last),
      ArrowUp: () => this.above(-1),
      ArrowDown: () => this.above(1),
      Home: () => 0,
      End: () => last,
    }[event.key];
    if (to) {
      event.preventDefault();
      this.at = to();
      this.mark(this.at);
      onLook({ kind: this.kind, at: this.at }, true, true);
    } else if (event.key === "Escape") {
      onLook(null, true);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onLook({ kind: this.kind, at: this.at }, true, true);
    }
  }

  // Gives the nearest token on the next line, or on the line before.
  above(step) {
    const here = this.elements[this.at], middle = here.offsetLeft + here.offsetWidth / 2;
    let best = this.at, line = null, nearest = Infinity;
    for (let at = this.at + step; at >= 0 && at < this.elements.length; at += step) {
      const element = this.elements[at];
      if (element.offsetTop === here.offsetTop) continue;
      line = line === null ? element.offsetTop : line;
      if (element.offsetTop !== line) break;
      const distance = Math.abs(element.offsetLeft + element.offsetWidth / 2 - middle);
      if (distance < nearest) [best, nearest] = [at, distance];
    }
    return best;
  }

  // Gives the place of the keyboard.
  mark(at) {
    if (this.marked) this.marked.classList.remove("current");
    this.marked = at === null ? null : this.elements[at];
    if (!this.marked) return;
    this.marked.classList.add("current");
    this.marked.scrollIntoView({ block: "nearest" });
    this.box.setAttribute("aria-activedescendant", this.marked.id);
  }
}
