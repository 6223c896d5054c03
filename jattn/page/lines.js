// Draws lines from the chosen token to others, and marks their places in a long text.

const MOST_LINES = 24; // of each colour; more would be hard to tell apart

// Draws above all sides, so that a line may go from one text to another.
function drawLines(from, found, className) {
  const svg = byId("curves"), origin = svg.getBoundingClientRect();
  const top = (element) => {
    const box = element.getBoundingClientRect();
    return [box.left + box.width / 2 - origin.left, box.top - origin.top + 1];
  };
  const [x, y] = top(from), parts = document.createDocumentFragment();
  for (const [element, weight] of found.slice(0, MOST_LINES)) {
    const [u, v] = top(element);
    // A token farther off than the window is high has no line, only a mark in the strip.
    if (element === from || Math.abs(v - y) > innerHeight) continue;
    // The bow is higher for tokens farther apart, so that lines in a row stay apart.
    const rise = Math.min(12 + 0.12 * Math.hypot(u - x, v - y), 44);
    const path = document.createElementNS(svg.namespaceURI, "path");
    const isSame = element.parentElement === from.parentElement, half = (y + v) / 2;
    const [a, b] = isSame ? [y - rise, v - rise] : [half, half];
    path.setAttribute("d", `M${x},${y} C${x},${a} ${u},${b} ${u},${v}`);
    path.setAttribute("class", className);
    path.setAttribute("stroke-width", (1 + 3 * Math.sqrt(weight)).toFixed(2));
    path.setAttribute("stroke-opacity", Math.max(0.12, Math.sqrt(weight)).toFixed(2));
    parts.append(path);
  }
  svg.append(parts);
}

// A strip beside a long text, with a mark for each coloured token.
class Overview {
  constructor(side, onJump) {
    this.side = side;
    this.canvas = make("canvas", { className: "overview" });
    this.canvas.setAttribute("aria-hidden", "true");
    const jump = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientY - box.top) / box.height, 0), 0.999);
      onJump(Math.floor(share * side.elements.length));
    };
    this.canvas.addEventListener("pointerdown", jump);
    this.canvas.addEventListener("pointermove", (event) => event.buttons && jump(event));
    side.box.after(this.canvas);
  }

  draw(out, into, active) {
    const tall = this.side.box.offsetHeight, room = Math.min(innerHeight - 40, tall);
    const isShown = tall > innerHeight;
    this.canvas.style.display = isShown ? "block" : "none";
    if (!isShown) return;
    this.canvas.style.height = `${room}px`;
    const ratio = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: 12 * ratio, height: room * ratio });
    const paint = this.canvas.getContext("2d"), step = this.canvas.height / this.side.elements.length;
    const mark = (at, colour, share) => {
      paint.fillStyle = `rgb(${colour.join(" ")} / ${share})`;
      paint.fillRect(0, at * step, this.canvas.width, Math.max(step, 2 * ratio));
    };
    const [blue, orange] = [colourOf("out"), colourOf("in")];
    for (const [at, weight] of into) mark(at, orange, Math.max(0.1, Math.sqrt(weight)));
    for (const [at, weight] of out) mark(at, blue, Math.max(0.1, Math.sqrt(weight)));
    if (active !== null) mark(active, colourOf("ink"), 1);
  }
}
