// Writes the names of queries and keys along the sides of a mask.

function nameOf(kind, at) {
  const words = kind === "key" && facts.key_tokens ? facts.key_tokens : facts.tokens;
  return words ? `${words[at]} ${at}` : String(at);
}

// Shortens a name to the room that it has.
function cut(paint, text, room) {
  if (paint.measureText(text).width <= room) return text;
  let letters = [...text].slice(0, 40);
  while (letters.length && paint.measureText(`${letters.join("")}…`).width > room) letters.pop();
  return `${letters.join("")}…`;
}

// Gives the step from name to name, 1, 2, 5, 10, …: the smallest one that leaves room.
function stepOf(scale) {
  const steps = [1, 2, 5].flatMap((n) => [...Array(8).keys()].map((power) => n * 10 ** power));
  return Math.min(...steps.filter((n) => n * scale >= 18));
}

function drawNames(paint, { left, top, scale }, { x, y, width, height, gutter, colour }) {
  const step = stepOf(scale);
  const places = (from, to) => {
    const first = Math.max(Math.ceil(Math.floor(from) / step), 0) * step;
    return Array.from({ length: Math.max(Math.ceil((to - first) / step), 0) }, (_, i) => first + i * step);
  };
  paint.font = "12px system-ui, sans-serif";
  paint.fillStyle = `rgb(${colour.join(" ")})`;
  paint.textBaseline = "middle";
  paint.textAlign = "right";
  for (const t of places(top, Math.min(facts.T, top + height / scale))) {
    const down = y(t) + scale / 2;
    if (down < 0 || down > height) continue;
    paint.fillText(cut(paint, nameOf("query", t), gutter.x - 12), Math.max(x(0), 0) - 6, down);
  }
  paint.textAlign = "left";
  for (const s of places(left, Math.min(facts.S, left + width / scale))) {
    const right = x(s) + scale / 2;
    if (right < 0 || right > width) continue;
    paint.save();
    paint.translate(right, Math.max(y(0), 0) - 6);
    paint.rotate(-Math.PI / 2);
    paint.fillText(cut(paint, nameOf("key", s), gutter.y - 12), 0, 0);
    paint.restore();
  }
}
