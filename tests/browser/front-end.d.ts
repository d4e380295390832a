/**
 * Invariant: the front end's own modules have no types here: what adapter.js takes from them it has to look at first.
 *
 * They are served by the host and lie in no folder of this checkout.
 */
declare module "*/scripts/app.js" {
  export const app: any;
}

declare module "*/scripts/api.js" {
  export const api: any;
}
