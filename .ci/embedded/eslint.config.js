// The rules for the JavaScript inside swiftcms_ws.py, which .ci/extract.py writes into files.
import js from "@eslint/js";
import globals from "globals";

export default [
  js.configs.recommended,
  {
    languageOptions: {
      // Class fields and private methods need ES2022. Nothing newer may be used.
      ecmaVersion: 2022,
      sourceType: "script",
      globals: globals.browser,
    },
    linterOptions: { reportUnusedDisableDirectives: "error" },
    rules: {
      eqeqeq: "error",
      "no-shadow": "error",
      "no-var": "error",
      "prefer-const": "error",
    },
  },
  { files: ["**/inspector.js", "**/demo.js"], languageOptions: { sourceType: "module" } },
  { files: ["**/demo.js"], languageOptions: { globals: { SwiftCMS: "readonly" } } },
];
