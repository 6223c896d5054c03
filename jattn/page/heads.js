// Joins the map, the text and the panel: keeps what is chosen, and shows it in all three.

start((arrays) => {
  const numbers = new Numbers(arrays), hasWeights = numbers.hasWeights;
  const isCross = facts.key_tokens !== null;
  const words = { query: facts.tokens, key: facts.key_tokens || facts.tokens };
  const view = { slots: [], place: null, pinned: null, other: null, shows: "", colours: "" };

  const sides = isCross
    ? [new Side("query", words.query, "Queries"), new Side("key", words.key, "Keys")]
    : [new Side("both", words.query, "Tokens of the text")];
  const sideOf = (kind) => sides.find((side) => side.kind === kind || side.kind === "both");
  const elements = (kind) => sideOf(kind).elements;
  const kindOf = (place) => isCross ? place.kind : "both";
  const overviews = sides.map((side) => new Overview(side, (at) => {
    side.elements[at].scrollIntoView({ block: "center" });
  }));
  const map = new HeadMap(numbers, choose);
  const panel = new Panel(numbers, words, (place, isPressed) => {
    const here = { kind: kindOf(place), at: place.at };
    if (isPressed) elements(place.kind)[place.at].scrollIntoView({ block: "nearest" });
    if (place.isJump) return look(here, true, true);
    return compare(here);
  });

  function choose(slots) {
    view.slots = slots;
    map.choose(slots);
    const many = slots.length > 1 ? `mean of ${slots.length} heads` : numbers.name(slots[0]);
    byId("chosen").textContent = many[0].toUpperCase() + many.slice(1);
    colour();
    show();
    say(many);
  }

  // Sets the colour behind each token, while the pointer is at none.
  function colour() {
    for (const [name, kind] of [["received", "key"], ["entropy", "query"]]) {
      if (isCross ? !facts[name] : view.colours !== name) continue;
      const isOn = view.colours !== "none";
      const amounts = elements(kind).map((_, at) => isOn ? numbers.of(name, view.slots, at) : 0);
      // A few tokens receive far more than all others, so the top 2 % do not set the scale.
      const known = amounts.filter((amount) => amount > 0).sort((x, y) => y - x);
      const top = known[Math.floor(0.02 * known.length)] || 1;
      elements(kind).forEach((element, at) => setShade(element, shade(amounts[at] / top)));
    }
    if (view.colours === "none") sides.forEach((side) => side.elements.forEach((x) => setShade(x, "0.00")));
  }

  // Sets a style only where it changes, because styling thousands of tokens takes time.
  function setShade(element, share) {
    if (element.share !== share) element.style.setProperty("--r", share);
    element.share = share;
  }

  // Shows a token while the pointer is at it; a press keeps it shown.
  function look(place, isPressed, stays = false) {
    if (isPressed) {
      const isSame = place && view.pinned && place.at === view.pinned.at && place.kind === view.pinned.kind;
      view.pinned = isSame && !stays ? null : place;
      view.place = place && !(isSame && !stays) ? place : null;
      view.other = null;
    } else if (view.pinned) {
      return compare(place);
    } else {
      view.place = place;
    }
    show();
    if (isPressed) say(sentence());
  }

  function compare(other) {
    view.other = other && view.place && other.at !== view.place.at | other.kind !== view.place.kind ? other : null;
    showPair();
  }

  // Gives the pair of the chosen token and the other one, in the direction with a weight.
  function pair() {
    const { place, other } = view;
    if (!place || !hasWeights) return null;
    const there = (query, key) => ({ query, key, most: Math.max(...view.slots.map((slot) => numbers.weight(slot, query, key) || 0)) });
    if (!other) {
      const strongest = place.kind === "key" ? null : view.out[0];
      return strongest ? there(place.at, strongest[0]) : null;
    }
    if (isCross) {
      if (place.kind === other.kind) return null;
      return place.kind === "query" ? there(place.at, other.at) : there(other.at, place.at);
    }
    const [forth, back] = [there(place.at, other.at), there(other.at, place.at)];
    const isBack = back.most === forth.most ? other.at > place.at : back.most > forth.most;
    return isBack ? back : forth;
  }

  function show() {
    const { place, slots } = view;
    view.out = place && place.kind !== "key" && hasWeights ? numbers.attendsTo(slots, place.at) : [];
    view.into = place && place.kind !== "query" && hasWeights ? numbers.attendedBy(slots, place.at) : [];
    sides.forEach((side) => side.box.classList.toggle("looking", Boolean(place) && hasWeights));
    paint();
    if (place) panel.showToken(place, slots, view.out, view.into, Boolean(view.pinned));
    else panel.showHeads(slots);
    showPair();
    overviews.forEach((overview, i) => {
      const isKeys = sides[i].kind !== "query", isQueries = sides[i].kind !== "key";
      const isHere = place && (place.kind === sides[i].kind);
      overview.draw(isKeys ? view.out : [], isQueries ? view.into : [], isHere ? place.at : null);
    });
  }

  let painted = [];
  function paint() {
    for (const element of painted) {
      element.classList.remove("out", "in", "active");
      element.setAttribute("aria-selected", "false");
    }
    painted = [];
    byId("curves").replaceChildren();
    const mark = (kind, found, name) => found.map(([at, weight]) => {
      const element = elements(kind)[at];
      element.classList.remove("out", "in");
      element.classList.add(name);
      element.style.setProperty("--w", shade(weight));
      painted.push(element);
      return [element, weight];
    });
    // The keys it attends to come last, so a token that attends to itself has their colour.
    const into = mark("query", view.into, "in"), out = mark("key", view.out, "out");
    if (!view.place) return;
    const here = elements(view.place.kind)[view.place.at];
    here.classList.add("active");
    here.setAttribute("aria-selected", "true");
    painted.push(here);
    if (!byId("lines-on").checked) return;
    drawLines(here, into, "in");
    drawLines(here, out, "out");
  }

  let ringed = null;
  function showPair() {
    if (ringed) ringed.classList.remove("other");
    ringed = view.other ? elements(view.other.kind)[view.other.at] : null;
    if (ringed) ringed.classList.add("other");
    const found = pair();
    if (view.place) panel.showPair(view.other && found, view.slots);
    if (view.shows === "pair") drawMap(found);
  }

  function drawMap(found = pair()) {
    map.draw(view.shows, found);
    byId("map-note").textContent = note(found);
  }

  function note(found) {
    if (view.shows === "pictures") return "Queries downwards, keys across.";
    if (view.shows === "entropy") return "Entropy in nats, mean over tokens: 0 where one key has all.";
    if (view.shows === "received") return "Share of all weight, in %, that one token receives.";
    if (!found) return "Choose a token: how much does each head attend from it to another one?";
    return `How much “${spoken(words.query[found.query])}” attends to “${spoken(words.key[found.key])}”, in %.`;
  }

  // Gives the text that a screen reader says of the chosen token.
  function sentence() {
    if (!view.place) return "No token is chosen.";
    const { kind, at } = view.place, name = spoken((kind === "key" ? words.key : words.query)[at]);
    const list = (found, kind) => found.slice(0, 3).map(([i, w]) => `${spoken(words[kind][i])} ${percent(w)}`).join(", ");
    const parts = [`${name}, token ${at}.`];
    if (view.out.length) parts.push(`Attends to ${list(view.out, "key")}.`);
    if (view.into.length) parts.push(`Is attended to by ${list(view.into, "query")}.`);
    return parts.join(" ");
  }

  let timer = 0;
  function say(text) { // after a pause, so that of many quick steps only the last is said
    clearTimeout(timer);
    timer = setTimeout(() => { byId("said").textContent = text; }, 150);
  }

  function about() {
    const { heads, T, S } = facts;
    const parts = [`${count(heads.length, "layer")}, ${count(heads.reduce((x, y) => x + y), "head")}`];
    if (isCross) parts.push(`${T === 1 ? "1 query" : `${T} queries`}, ${count(S, "key")}`);
    else if (hasText) parts.push(count(T, "token"));
    if (hasWeights && facts.complete) parts.push("every weight is on this page");
    else if (hasWeights) parts.push(`the largest weights are on this page: ${percent(facts.held)} of all`);
    return parts.join(" · ");
  }

  byId("about").textContent = about();
  byId("text").hidden = !hasText;
  byId("main").classList.toggle("no-text", !hasText);
  byId("several").parentElement.hidden = numbers.slots.length === 2;
  byId("lines-label").hidden = !hasWeights;
  byId("lines-on").addEventListener("change", paint);
  sides.forEach((side) => side.listen(look));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && view.place) look(null, true);
  });
  const shows = hasWeights ? { pictures: "pictures", entropy: "entropy", pair: "one pair" } : { [facts.kind]: facts.kind };
  const colours = isCross ? { both: "colour", none: "plain" } : {
    ...(facts.received ? { received: "received" } : {}),
    ...(facts.entropy ? { entropy: "entropy" } : {}),
    none: "plain",
  };
  view.slots = [facts.heads[0] > 1 ? facts.heads[0] : 0];
  choice(byId("shows"), shows, (value) => { view.shows = value; drawMap(); })(Object.keys(shows)[0]);
  choice(byId("colours"), colours, (value) => { view.colours = value; colour(); })(Object.keys(colours)[0]);
  choose(view.slots);
  startTheme(() => { drawMap(); show(); });
  addEventListener("resize", show);
});
