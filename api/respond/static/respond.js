// The pages of the freezes, live: fetched again as often as they say, and what
// changed is put in. Everything works without it.
'use strict';

(() => {
  const here = location.pathname;
  let wait = 0;
  async function refresh() {
    try {
      const r = await fetch(here, { headers: { Accept: 'text/html' }, credentials: 'same-origin', cache: 'no-store', redirect: 'manual' });
      const over = r.type === 'opaqueredirect' || r.status === 401;
      document.getElementById('over').hidden = !over;
      if (over) return; // no session any more: nothing changes by itself
      if (r.ok) {
        const page = new DOMParser().parseFromString(await r.text(), 'text/html');
        const old = document.getElementById('live'), now = page.getElementById('live');
        if (old && now && old.dataset.version !== now.dataset.version) {
          old.replaceWith(now);
          document.getElementById('announce').textContent = 'This page was updated.';
        }
        document.body.dataset.every = page.body.dataset.every || '0';
      }
    } catch (e) {
      // The recorder may be restarting: the next fetch tells.
    }
    soon();
  }
  function soon() {
    const seconds = Number(document.body.dataset.every);
    if (seconds > 0) wait = setTimeout(refresh, seconds * 1000);
  }
  document.addEventListener('visibilitychange', () => {
    clearTimeout(wait);
    if (!document.hidden) refresh();
  });
  if (document.getElementById('live')) soon();
})();
