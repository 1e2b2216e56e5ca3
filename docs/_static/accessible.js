/* What the theme leaves out for those who read with a keyboard or a screen reader. */
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll('[role="heading"]:not([aria-level])').forEach((one) => one.setAttribute("aria-level", "2"));
  for (const [name, label] of [["sidebar-drawer", "Site"], ["toc-drawer", "This page"]]) {
    document.querySelector(`aside.${name}`)?.setAttribute("aria-label", label);
  }
  // The corner of a table heads no column.
  document.querySelectorAll("thead th").forEach((one) => {
    if (!one.textContent.trim()) one.replaceWith(Object.assign(document.createElement("td"), { className: "head" }));
  });
  const reachable = () => document.querySelectorAll("pre, .table-wrapper").forEach((one) => {
    if (one.scrollWidth > one.clientWidth) one.tabIndex = 0; else one.removeAttribute("tabindex");
  });
  new ResizeObserver(reachable).observe(document.body);
});
