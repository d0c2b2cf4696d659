// Where require.js finds the widgets' own files: beside it, on every level of the site.
var require = {baseUrl: document.documentElement.dataset.content_root + "_static/vendor"};
