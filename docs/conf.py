"""The site: ``make docs`` builds it into ``build/site``, without a network and without a warning."""

from vlprompt.core.version import package_version

project = "vlprompt"
author = "The vlprompt contributors"
version = package_version()
release = version

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/*.py"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, which the site has not

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
add_module_names = False

html_theme = "furo"
html_title = "vlprompt"
html_static_path = ["_static"]
html_js_files = ["keyboard.js"]
html_copy_source = False
html_show_sourcelink = False
