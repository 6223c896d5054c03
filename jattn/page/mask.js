// A picture of a mask that can be moved and zoomed; a text names the pair at the pointer.

const SMALLEST = 4; // pixels of a block; a smaller block is drawn without its pairs
const LARGEST = 48; // pixels of a pair, at most

start((arrays) => {
  const pairs = new Pairs(arrays), canvas = byId("pairs"), paint = canvas.getContext("2d");
  // `scale`: pixels of a pair; `left`, `top`: the key and the query at the corner.
  const view = { scale: 1, left: 0, top: 0, at: null };
  let colours = {}, blocks = null, width = 0, height = 0, ratio = 1, isAsked = false;
  let gutter = { x: 0, y: 0 }; // room for names, at the left and above

  const smallest = () => Math.min(width / facts.S, height / facts.T);
  const within = (x, low, high) => Math.min(Math.max(x, low), high);

  function settle() {
    view.scale = within(view.scale, smallest(), Math.max(LARGEST, smallest()));
    // A mask smaller than the window is centred.
    const settled = (from, length, room) => {
      const seen = room / view.scale;
      return seen >= length ? (length - seen) / 2 : within(from, 0, length - seen);
    };
    view.left = settled(view.left, facts.S, width);
    view.top = settled(view.top, facts.T, height);
    if (!isAsked) requestAnimationFrame(draw);
    isAsked = true;
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const [key, query] = [view.left + x / view.scale, view.top + y / view.scale];
    view.scale = within(view.scale * factor, smallest(), Math.max(LARGEST, smallest()));
    view.left = key - x / view.scale;
    view.top = query - y / view.scale;
    settle();
  }

  function draw() {
    isAsked = false;
    const { scale, left, top } = view;
    paint.setTransform(ratio, 0, 0, ratio, gutter.x * ratio, gutter.y * ratio);
    paint.clearRect(-gutter.x, -gutter.y, width + gutter.x, height + gutter.y);
    const [x, y] = [(key) => (key - left) * scale, (query) => (query - top) * scale];
    drawNames(paint, view, { x, y, width, height, gutter, colour: colours.soft });
    paint.save();
    paint.beginPath();
    paint.rect(0, 0, width, height);
    paint.clip();
    const [s, t] = [Math.floor(Math.max(left, 0)), Math.floor(Math.max(top, 0))];
    const [S, T] = [Math.min(facts.S, Math.ceil(left + width / scale)), Math.min(facts.T, Math.ceil(top + height / scale))];
    if (scale * Math.min(pairs.rows, pairs.columns) >= SMALLEST) {
      // Draws each pair; if a pixel has many pairs, draws the one in its middle.
      const step = Math.max(1 / (scale * ratio), 1);
      const chosen = (from, to) => Uint32Array.from({ length: Math.ceil((to - from) / step) }, (_, i) => Math.min(from + (i + 0.5) * step, to - 1));
      const [queries, keys] = [chosen(t, T), chosen(s, S)];
      paint.imageSmoothingEnabled = false;
      paint.drawImage(pairs.pairsPicture(queries, keys, colours), x(s), y(t), keys.length * step * scale, queries.length * step * scale);
    } else {
      // The last block may reach beyond the mask, so the picture is clipped.
      paint.imageSmoothingEnabled = scale * pairs.columns < 1;
      paint.save();
      paint.beginPath();
      paint.rect(x(0), y(0), facts.S * scale, facts.T * scale);
      paint.clip();
      paint.drawImage(blocks, x(0), y(0), pairs.across * pairs.columns * scale, pairs.down * pairs.rows * scale);
      paint.restore();
    }
    if (scale >= 9) rule(1, 1, 1);
    if (scale * Math.min(pairs.rows, pairs.columns) >= 12) rule(pairs.rows, pairs.columns, 2);
    drawCursor(x, y);
    paint.restore();
  }

  // Draws lines between pairs, or between blocks.
  function rule(rows, columns, thick) {
    const { scale, left, top } = view;
    paint.fillStyle = `rgb(${colours.paper.join(" ")})`;
    for (let s = Math.max(Math.ceil(left / columns), 1) * columns; s < Math.min(left + width / scale, facts.S); s += columns) {
      paint.fillRect((s - left) * scale - thick / 2, Math.max(-top * scale, 0), thick, facts.T * scale);
    }
    for (let t = Math.max(Math.ceil(top / rows), 1) * rows; t < Math.min(top + height / scale, facts.T); t += rows) {
      paint.fillRect(Math.max(-left * scale, 0), (t - top) * scale - thick / 2, facts.S * scale, thick);
    }
  }

  function drawCursor(x, y) {
    if (!view.at) return;
    const [query, key] = view.at, size = Math.max(view.scale, 5);
    paint.strokeStyle = `rgb(${colours.ring.join(" ")})`;
    paint.lineWidth = 2;
    paint.strokeRect(x(key) - 1, y(query) - 1, size + 2, size + 2);
  }

  function read() {
    if (!view.at) {
      byId("read").textContent = "Point at a pair, or go to it with the arrow keys.";
      return;
    }
    const [query, key] = view.at, allowed = pairs.allows(query, key);
    const may = allowed === null ? "perhaps may attend" : allowed ? "may attend" : "may not attend";
    const kind = ["is empty: it is skipped", "is partial: the mask is asked", "is full: no mask is needed"][pairs.kind(query, key)];
    const block = `${Math.floor(query / pairs.rows)}, ${Math.floor(key / pairs.columns)}`;
    byId("read").textContent = `Query ${nameOf("query", query)} ${may} to key ${nameOf("key", key)}. Block ${block} ${kind}.`;
  }

  function point(x, y) {
    const [key, query] = [Math.floor(view.left + x / view.scale), Math.floor(view.top + y / view.scale)];
    const isInside = key >= 0 && query >= 0 && key < facts.S && query < facts.T;
    view.at = isInside ? [query, key] : null;
    read();
    settle();
  }

  const places = new Map(); // of fingers or the mouse, while they are down
  const local = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left - gutter.x, event.clientY - box.top - gutter.y];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    places.set(event.pointerId, local(event));
    point(...local(event));
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => places.delete(event.pointerId));
  }
  canvas.addEventListener("pointermove", (event) => {
    const here = local(event), before = places.get(event.pointerId);
    if (!before) return point(...here);
    const others = [...places].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    places.set(event.pointerId, here);
    if (others.length) { // two fingers: the pair between them stays between them
      const [x, y] = others[0], apart = ([u, v]) => Math.hypot(u - x, v - y) || 1;
      return zoom(apart(here) / apart(before), (here[0] + x) / 2, (here[1] + y) / 2);
    }
    view.left -= (here[0] - before[0]) / view.scale;
    view.top -= (here[1] - before[1]) / view.scale;
    return settle();
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), ...local(event));
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(3, ...local(event)));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key in steps) {
      const [down, right] = steps[event.key], [query, key] = view.at || [-down, -right];
      const [rows, columns] = event.shiftKey ? facts.block : [1, 1];
      view.at = [within(query + down * rows, 0, facts.T - 1), within(key + right * columns, 0, facts.S - 1)];
      follow();
      read();
    } else if (event.key === "+" || event.key === "=") zoom(1.5, ...cursor());
    else if (event.key === "-") zoom(1 / 1.5, ...cursor());
    else if (event.key === "0") whole();
    else return;
    event.preventDefault();
  });

  const cursor = () => view.at
    ? [(view.at[1] + 0.5 - view.left) * view.scale, (view.at[0] + 0.5 - view.top) * view.scale]
    : [width / 2, height / 2];

  // Moves the window so that the pair at the cursor is in it.
  function follow() {
    const [query, key] = view.at, [seenKeys, seenQueries] = [width / view.scale, height / view.scale];
    view.left = within(view.left, key + 2 - seenKeys, key - 1);
    view.top = within(view.top, query + 2 - seenQueries, query - 1);
    settle();
  }

  function whole() {
    view.scale = smallest();
    settle();
  }

  function recolour() {
    const names = ["paper", "ink", "ring", "empty", "partial", "full", "some", "gap", "soft"];
    colours = Object.fromEntries(names.map((name) => [name, colourOf(name)]));
    blocks = pairs.blocksPicture(colours);
    settle();
  }

  function resize() {
    const isWhole = view.scale <= smallest() * 1.001 || !width;
    const digits = 8 * String(Math.max(facts.T, facts.S)).length + 16;
    const named = facts.tokens ? Math.min(120, 0.24 * innerWidth) : digits;
    gutter = { x: named, y: Math.min(named, 80) };
    // The canvas has the shape of the mask if there is room, and is 200 pixels wide or more.
    const tallest = within(innerHeight - 235, 320, 740) - gutter.y;
    width = Math.min(canvas.parentElement.clientWidth - gutter.x, Math.max(tallest * facts.S / facts.T, 200));
    height = within(width * facts.T / facts.S, Math.min(200, tallest), tallest);
    ratio = devicePixelRatio || 1;
    const [wide, tall] = [width + gutter.x, height + gutter.y];
    Object.assign(canvas.style, { width: `${wide}px`, height: `${tall}px` });
    Object.assign(canvas, { width: wide * ratio, height: tall * ratio });
    if (isWhole) whole(); else settle();
  }

  const why = facts.why ? ` · single pairs are not all here: ${facts.why}` : "";
  const [rows, columns] = facts.block;
  byId("about").textContent = `${facts.T} queries × ${facts.S} keys in blocks of ${rows} × ${columns}: ${facts.shares.join(", ")}${why}`;
  const has = (kind) => pairs.kinds.includes(kind);
  const entry = (isThere, name, text) => {
    if (!isThere) return "";
    const dot = make("span", { className: "dot square" });
    dot.style.background = `var(--${name})`;
    return make("li", {}, dot, text);
  };
  const isPairwise = rows * columns === 1;
  byId("legend").append(
    entry(has(FULL), "full", isPairwise ? "may attend" : "full block"),
    entry(has(PARTIAL), "partial", "partial block"),
    entry(has(PARTIAL), "some", "pair in it that may attend"),
    entry(has(PARTIAL), "gap", "pair in it that may not"),
    entry(has(EMPTY), "empty", isPairwise ? "may not" : "empty block"));
  byId("closer").addEventListener("click", () => zoom(2, ...cursor()));
  byId("farther").addEventListener("click", () => zoom(0.5, ...cursor()));
  byId("whole").addEventListener("click", whole);
  startTheme(recolour);
  resize();
  read();
  addEventListener("resize", resize);
});
