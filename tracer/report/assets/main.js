// Start the scripts of both sections, and mark the section in view in the contents.

const suspectsRoot = document.getElementById("suspects");
if (suspectsRoot) new Suspects(suspectsRoot);
const targetsRoot = document.getElementById("targets");
if (targetsRoot) new Targets(targetsRoot);

const links = new Map(Array.from(document.querySelectorAll('nav a[href^="#"]'), (link) => [link.getAttribute("href").slice(1), link]));
const reading = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const [id, link] of links) {
      if (id === entry.target.id) link.setAttribute("aria-current", "location");
      else link.removeAttribute("aria-current");
    }
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const id of links.keys()) reading.observe(document.getElementById(id));
document.documentElement.dataset.ready = "yes";
