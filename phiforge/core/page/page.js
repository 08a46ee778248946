
"use strict";
// Theme button: system, light, dark. Without this script the page follows the system.
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const names = ["system", "light", "dark"];
  let current = "system";
  try { current = localStorage.getItem("theme") || current; } catch { /* opened from a file */ }
  const show = () => {
    if (current === "system") delete root.dataset.theme; else root.dataset.theme = current;
    button.textContent = "Theme: " + current;
  };
  button.addEventListener("click", () => {
    current = names[(names.indexOf(current) + 1) % names.length];
    try { localStorage.setItem("theme", current); } catch { /* opened from a file */ }
    show();
  });
  button.hidden = false;
  show();
  // Paper cannot be clicked: open what is folded, and fold it again afterwards.
  addEventListener("beforeprint", () => {
    for (const d of document.querySelectorAll("details:not([open])")) {
      d.open = true;
      d.dataset.folded = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const d of document.querySelectorAll("details[data-folded]")) {
      d.open = false;
      delete d.dataset.folded;
    }
  });
})();
