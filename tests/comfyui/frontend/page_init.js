// Counts the observers that are at work.
window.watching = new Set();
for (const kind of ["ResizeObserver", "MutationObserver"]) {
  const Kind = window[kind];
  window[kind] = class extends Kind {
    observe(target, ...rest) {
      if (target.matches?.(".mg-view, html, body")) window.watching.add(this);
      super.observe(target, ...rest);
    }
    disconnect() { window.watching.delete(this); super.disconnect(); }
  };
}
