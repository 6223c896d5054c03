// Chooses light or dark: as in the system, until the user presses the switch.

const systemDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemDark.matches;
}

// Calls `onChange` after each change, to draw again what has no style, such as a canvas.
function startTheme(onChange) {
  const button = byId("theme");
  const show = () => {
    colourOf.known.clear();
    button.textContent = isDark() ? "☀" : "☾";
    button.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
    button.title = button.getAttribute("aria-label");
    onChange();
  };
  try { // a notebook's frame has no storage
    const kept = localStorage.getItem("jattn-theme");
    if (kept) document.documentElement.dataset.theme = kept;
  } catch { /* nothing is remembered */ }
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try { localStorage.setItem("jattn-theme", theme); } catch { /* as above */ }
    show();
  });
  systemDark.addEventListener("change", show);
  show();
}

// Gives a colour of the style as [red, green, blue], as a canvas cannot use its names.
function colourOf(name) {
  if (!colourOf.known.has(name)) colourOf.known.set(name, readColour(name));
  return colourOf.known.get(name);
}

colourOf.known = new Map(); // until the theme changes

function readColour(name) {
  const probe = make("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return found.slice(0, 3);
}
