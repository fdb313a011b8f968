// Before the first paint: the user's choice of light or dark, so that nothing flashes.
const chosen = localStorage.getItem("edgert-theme");
if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
