/* What is common to all pages: the paragraph that can be copied. */
"use strict";
{
  const button = document.getElementById("copy"), text = document.getElementById("methods-text");
  button?.addEventListener("click", async () => {
    let done = true;
    try { await navigator.clipboard.writeText(text.textContent); } catch { // a file has no clipboard in some browsers
      getSelection().selectAllChildren(text);
      done = document.execCommand("copy");
    }
    document.getElementById("copied").textContent = done ? "Copied." : "Press Ctrl-C or ⌘-C: it is selected.";
  });
}
