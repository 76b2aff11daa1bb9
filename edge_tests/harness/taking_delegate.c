/* An external delegate of TensorFlow Lite for tests: it takes the first FULLY_CONNECTED operator of floats.
 *
 * Options: take=one (else it takes nothing), wrong (its answers are 1 too high), device=none (it refuses),
 * crash (it ends its process). The structures are the library's interface for 64-bit machines.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int size; int data[]; } Ints;
typedef struct { int type; char *data; Ints *dims; float scale; int zero; int allocation; size_t bytes;
                 const void *allocated; const char *name; void *delegate; int handle; char stale, variable;
                 int quantized; void *quantization, *sparsity; Ints *signature; } Tensor;
typedef struct { Ints *inputs, *outputs, *intermediates, *temporaries; void *user_data, *builtin_data; } Node;
typedef struct Context Context;
typedef struct Delegate Delegate;
typedef struct { void *(*init)(Context *, const char *, size_t); void (*free)(Context *, void *);
                 int (*prepare)(Context *, Node *); int (*invoke)(Context *, Node *);
                 const char *(*profile)(const Context *, const Node *); int32_t builtin_code;
                 const char *custom_name; int version; void *rest[4]; } Registration;
struct Context { size_t tensors_size; int (*plan)(Context *, Ints **); Tensor *tensors; void *impl;
                 void *resize, *report, *add; int (*node)(Context *, int, Node **, Registration **);
                 int (*replace)(Context *, Registration, const Ints *, Delegate *); };
struct Delegate { void *data; int (*prepare)(Context *, Delegate *); void *copy[3]; int64_t flags; void *opaque; };
typedef struct { Delegate *delegate; Ints *nodes, *inputs, *outputs; } Params;
typedef struct { int x, w, b, y, relu, takes; float off; } Layer;  /* one FULLY_CONNECTED */

static void *init(Context *c, const char *buffer, size_t length) { return ((const Params *)buffer)->delegate->data; }
static int ready(Context *c, Node *n) { return 0; }
static int invoke(Context *c, Node *n) {
  Layer *l = n->user_data;
  Tensor *x = &c->tensors[l->x], *w = &c->tensors[l->w], *y = &c->tensors[l->y];
  float *in = (float *)x->data, *at = (float *)w->data, *out = (float *)y->data;
  float *bias = l->b < 0 ? 0 : (float *)c->tensors[l->b].data;
  int units = w->dims->data[0], depth = w->dims->data[1], rows = (int)(x->bytes / sizeof(float)) / depth;
  for (int r = 0; r < rows; r++)
    for (int u = 0; u < units; u++) {
      float sum = l->off + (bias ? bias[u] : 0);
      for (int d = 0; d < depth; d++) sum += in[r * depth + d] * at[u * depth + d];
      out[r * units + u] = l->relu && sum < 0 ? 0 : sum;
    }
  return 0;
}
static int prepare(Context *c, Delegate *self) {
  Layer *l = self->data;
  Ints *plan;
  if (!l->takes) return 0;
  if (c->plan(c, &plan)) return 1;
  for (int i = 0; i < plan->size; i++) {
    Node *n;
    Registration *r;
    if (c->node(c, plan->data[i], &n, &r)) return 1;
    if (r->builtin_code != 9 || c->tensors[n->inputs->data[0]].type != 1) continue;
    l->x = n->inputs->data[0], l->w = n->inputs->data[1], l->y = n->outputs->data[0];
    l->b = n->inputs->size > 2 ? n->inputs->data[2] : -1;
    l->relu = *(int *)n->builtin_data;
    struct { int size, data[1]; } one = {1, {plan->data[i]}};
    Registration mine = {.init = init, .prepare = ready, .invoke = invoke, .builtin_code = 51,
                         .custom_name = "Taking", .version = 1};
    return c->replace(c, mine, (Ints *)&one, self);
  }
  return 0;
}
Delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) {
  Delegate *self = calloc(1, sizeof *self);
  Layer *l = self->data = calloc(1, sizeof *l);
  for (size_t i = 0; i < count; i++) {
    if (!strcmp(keys[i], "take")) l->takes = !strcmp(values[i], "one");
    if (!strcmp(keys[i], "wrong")) l->off = 1;
    if (!strcmp(keys[i], "crash")) abort();
    if (!strcmp(keys[i], "device") && !strcmp(values[i], "none")) { report("no device is plugged in"); return 0; }
  }
  self->prepare = prepare;
  return self;
}
void tflite_plugin_destroy_delegate(Delegate *self) {
  if (self) free(self->data);
  free(self);
}
