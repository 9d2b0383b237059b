// Browsing of the training sequences, one recorded step at a time. Without it all of them are listed.
"use strict";
(() => {
  const browser = document.querySelector(".browser");
  const steps = [...document.querySelectorAll("details.step")];
  if (!browser || steps.length < 2) return;
  const range = browser.querySelector("input");
  const bars = [...browser.querySelectorAll("svg .bar")];
  const now = browser.querySelector(".now");
  const [earlier, later] = browser.querySelectorAll("button");

  function show(index) {
    steps.forEach((step, place) => {
      step.hidden = place !== index;
      step.open = place === index;
    });
    bars.forEach((bar, place) => bar.classList.toggle("current", place === index));
    range.value = index;
    now.textContent = steps[index].querySelector("summary").textContent;
    range.setAttribute("aria-valuetext", now.textContent);
    earlier.disabled = index === 0;
    later.disabled = index === steps.length - 1;
  }

  range.addEventListener("input", () => show(Number(range.value)));
  browser.addEventListener("click", (event) => {
    const go = event.target.closest("[data-go]");
    if (go) show(Number(range.value) + Number(go.dataset.go));
    const bar = bars.indexOf(event.target);
    if (bar >= 0) show(bar);
  });
  // Escape puts a token's details away (WCAG 1.4.13).
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.activeElement.matches(".t")) document.activeElement.blur();
  });
  browser.hidden = false;
  document.querySelector(".steps").classList.add("browsing");
  show(0);
})();
