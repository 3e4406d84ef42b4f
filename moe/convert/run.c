/* Text from model.bin, the weights and the tokenizer that `python -m experiments.export format=c` writes beside this.
   Compile: cc -O3 -std=c99 run.c -o run -lm (with -fopenmp: matrix rows on all cores). ./run lists the options.
   One token at a time through the blocks, float32, weights read from the mapped file. Letters as in
   the Python code: V vocabulary, D width, H heads, E experts, K experts per token, F width of an expert. */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wunknown-pragmas" /* OpenMP's, where it is not asked for */
enum { VERSION = 2, ALIGNMENT = 64, MOST = 1000000000 }; /* the last: no size in the header is larger */
/* What the numbers of the file mean; split: what the tokenizer splits a text into before it merges. */
enum dtype { F32, I8, U8, U32 }; enum activation { SWIGLU, GELU, GELU_TANH, RELU2 }; enum norm { RMS, LAYER };
enum position { ROPE, LEARNED }; enum qk_norm { QK_NONE, QK_HEAD, QK_FULL }; enum score { SOFTMAX, SIGMOID };
enum split { IDS_ONLY, CHARACTERS, WORDS }; enum character_class { OTHER, LETTER, NUMBER, SPACE };
enum around { BEFORE_USER, BEFORE_SYSTEM, BEHIND_SYSTEM, BEFORE_REPLY, BEHIND_REPLY, BEFORE_NEXT, N_AROUND };

/* The file: this header, the table, and the tensors in the order in which `load` takes them. All is little-endian. */
typedef struct {
    char magic[8];
    uint32_t version, checksum; /* CRC-32 of all that follows it */
    uint64_t size, n_tensors;   /* bytes of the file; entries of the table */
    int32_t vocab, context, n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, activation, norm, position, qk_norm,
        bias, tied, d_expert, n_shared, shared_gate, score, renormalize, selection_bias, groups, k_groups, group_top,
        attn_bias, int8, eot, document_end, n_tokens, split;
    float norm_eps, scale;
    char zero[100];
} Header;
typedef struct { char name[96]; uint32_t dtype, zero; uint64_t rows, cols, offset; } Entry;
typedef struct {
    const float *f; /* (rows, cols), or null where it is int8 */
    const int8_t *q; /* (rows, cols) */
    const float *scale, *bias; /* (rows, n_groups): a weight is q times its group's scale; (rows), or null */
    int rows, cols, n_groups;
} Linear;
typedef struct { int *ids, n, begin, read; } Text; /* n tokens, of which the model has read `read` from `begin` on */
typedef struct { double mass; int token; } Candidate;
typedef struct { const float *weight, *bias; } Norm;
typedef struct { Linear up, down; } Mlp;
typedef struct {
    Norm attn_norm, mlp_norm, q_norm, k_norm;
    Linear q, k, v, o, router, shared_gate;
    int n_experts, n_chosen; /* E and K; none in a dense layer */
    Mlp *experts, mlp; /* mlp: the dense one, or the shared experts */
    const float *selection_bias;
    float *keys, *values; /* (context, n_kv_heads * head_dim) */
} Layer;
typedef struct {
    Header h;
    const char *path;
    char prefix[64]; /* of the tensors that are taken */
    const unsigned char *bytes;
    const Entry *table;
    uint64_t at; /* the next tensor to take */
    Linear embed, head;
    const float *positions, *cos, *sin;
    Layer *layers;
    Norm norm;
    /* the tokenizer: token i is bytes ends[i - 1] to ends[i]; sorted: those that text is merged into, by their bytes */
    const uint32_t *ends, *sorted, *classes;
    const unsigned char *token_bytes;
    const char *chat[N_AROUND]; /* what stands around the turns of a conversation, by enum around; null: unknown */
    uint64_t n_sorted, n_classes;
    /* what a token's pass needs */
    float *x, *h_D, *q, *attended, *att, *z, *act, *y, *score, *rank, *weight, *logits;
    Candidate *candidates;
    int *chosen, start, widest, show_experts; /* start: where the current document begins; widest: rows of a matrix */
} Model;

#define refuse(...) (fputs("error: ", stderr), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(2))

static void *allocate(uint64_t count, uint64_t size) {
    void *memory = count < SIZE_MAX / size ? calloc(count ? count : 1, size) : NULL;
    if (!memory) refuse("there is not enough memory for %llu bytes.", (unsigned long long)(count * size));
    return memory;
}
static void broken(const Model *m, const char *why) { refuse("%s is no model: %s.", m->path, why); }

/* --- Reading the file */
static uint32_t crc32(const unsigned char *bytes, uint64_t n) {
    uint32_t table[256], crc = 0xFFFFFFFFu;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) table[i] = table[i] & 1 ? 0xEDB88320u ^ (table[i] >> 1) : table[i] >> 1;
    }
    for (uint64_t i = 0; i < n; i++) crc = table[(crc ^ bytes[i]) & 255] ^ (crc >> 8);
    return crc ^ 0xFFFFFFFFu;
}

static const Entry *next_entry(const Model *m) {
    static const Entry none;
    return m->at < m->h.n_tensors ? m->table + m->at : &none;
}

/* The next tensor of the table, which must be this one: `name` and `part` behind m->prefix. */
static const void *take(Model *m, uint32_t dtype, uint64_t rows, uint64_t cols, const char *name, const char *part) {
    static const uint64_t width[] = {4, 1, 1, 4};
    char full[160];
    snprintf(full, sizeof full, "%s%s%s", m->prefix, name, part);
    const Entry *entry = next_entry(m);
    m->at++;
    if (strncmp(entry->name, full, sizeof entry->name) || entry->dtype != dtype || entry->rows != rows ||
        entry->cols != cols)
        refuse("%s is no model: it has no tensor %s of that size where it should be.", m->path, full);
    uint64_t room = m->h.size - (entry->offset < m->h.size ? entry->offset : m->h.size);
    if (entry->offset % ALIGNMENT || (cols && rows > room / cols / width[dtype]))
        refuse("%s is no model: the tensor %s does not lie in the file.", m->path, full);
    return m->bytes + entry->offset;
}

static Linear linear(Model *m, int rows, int cols, int quantized, int bias, const char *name) {
    Linear w = {.rows = rows, .cols = cols};
    if (rows > m->widest) m->widest = rows;
    if (quantized) {
        w.q = take(m, I8, rows, cols, name, ".weight");
        uint64_t n_groups = next_entry(m)->cols;
        if (!n_groups || n_groups > (uint64_t)cols || cols % n_groups) broken(m, "scales do not divide a matrix");
        w.n_groups = (int)n_groups;
        w.scale = take(m, F32, rows, n_groups, name, ".scale");
    } else w.f = take(m, F32, rows, cols, name, ".weight");
    if (bias) w.bias = take(m, F32, 1, rows, name, ".bias");
    return w;
}
static Norm norm_of(Model *m, const char *name) {
    Norm norm = {take(m, F32, 1, m->h.d_model, name, ".weight"), NULL};
    if (m->h.norm == LAYER && m->h.bias) norm.bias = take(m, F32, 1, m->h.d_model, name, ".bias");
    return norm;
}
static Mlp mlp_of(Model *m, int width, int bias) {
    Mlp mlp;
    mlp.up = linear(m, width * (m->h.activation == SWIGLU ? 2 : 1), m->h.d_model, m->h.int8, bias, "up");
    mlp.down = linear(m, m->h.d_model, width, m->h.int8, bias, "down");
    return mlp;
}

static void check_header(const Model *m) {
    const Header *h = &m->h;
    const int32_t ranges[][3] = {
        {h->vocab, 1, MOST}, {h->context, 1, MOST}, {h->n_layers, 1, MOST}, {h->d_model, 1, MOST},
        {h->n_heads, 1, MOST}, {h->n_kv_heads, 1, MOST}, {h->head_dim, 1, MOST}, {h->d_ff, 1, MOST / 2},
        {h->d_expert, 1, MOST}, {h->groups, 1, MOST}, {h->k_groups, 1, h->groups}, {h->group_top, 1, MOST},
        {h->n_tokens, 1, h->vocab}, {h->n_shared, 0, MOST}, {h->eot, 0, h->vocab - 1}, {h->activation, 0, 3},
        {h->qk_norm, 0, 2}, {h->split, 0, 2}, {h->attn_bias, 0, 2}, {h->norm | h->position | h->bias | h->tied |
            h->shared_gate | h->score | h->renormalize | h->selection_bias | h->int8, 0, 1}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (ranges[i][0] < ranges[i][1] || ranges[i][0] > ranges[i][2]) broken(m, "its header has a size out of range");
    if ((int64_t)h->n_heads * h->head_dim > MOST || h->n_heads % h->n_kv_heads || (h->shared_gate && !h->n_shared) ||
        (h->position == ROPE && h->head_dim % 2) || h->d_expert > MOST / 2 / (h->n_shared + 1))
        broken(m, "the sizes in its header do not fit together");
}

static void load_layer(Model *m, int index, uint32_t n_experts, uint32_t n_chosen) {
    const Header *h = &m->h;
    Layer *layer = m->layers + index;
    int d = h->d_model, d_q = h->n_heads * h->head_dim, d_kv = h->n_kv_heads * h->head_dim;
    snprintf(m->prefix, sizeof m->prefix, "blocks.%d.", index);
    layer->attn_norm = norm_of(m, "attn_norm");
    layer->q = linear(m, d_q, d, h->int8, h->attn_bias > 0, "attn.q");
    layer->k = linear(m, d_kv, d, h->int8, h->attn_bias > 0, "attn.k");
    layer->v = linear(m, d_kv, d, h->int8, h->attn_bias > 0, "attn.v");
    layer->o = linear(m, d, d_q, h->int8, h->attn_bias > 1, "attn.o");
    int full = h->qk_norm == QK_FULL;
    if (h->qk_norm) layer->q_norm.weight = take(m, F32, 1, full ? d_q : h->head_dim, "attn.q_norm.weight", "");
    if (h->qk_norm) layer->k_norm.weight = take(m, F32, 1, full ? d_kv : h->head_dim, "attn.k_norm.weight", "");
    layer->mlp_norm = norm_of(m, "mlp_norm");
    layer->keys = allocate((uint64_t)h->context * d_kv, sizeof(float));
    layer->values = allocate((uint64_t)h->context * d_kv, sizeof(float));
    int width = n_experts ? h->n_shared * h->d_expert : h->d_ff; /* of the MLP that takes every token */
    if (n_experts > MOST || n_experts % h->groups || !n_chosen != !n_experts ||
        n_chosen > n_experts / h->groups * (uint64_t)h->k_groups)
        broken(m, "a layer chooses more experts than it has");
    layer->n_experts = (int)n_experts, layer->n_chosen = (int)n_chosen;
    if (n_experts) layer->router = linear(m, layer->n_experts, d, 0, 0, "mlp.router");
    if (n_experts && h->selection_bias) layer->selection_bias = take(m, F32, 1, n_experts, "mlp.router.bias", "");
    if (n_experts && h->shared_gate) layer->shared_gate = linear(m, 1, d, 0, 0, "mlp.shared_gate");
    if (n_experts) layer->experts = allocate(n_experts, sizeof(Mlp));
    for (int e = 0; e < layer->n_experts; e++) {
        snprintf(m->prefix, sizeof m->prefix, "blocks.%d.mlp.experts.%d.", index, e);
        layer->experts[e] = mlp_of(m, h->d_expert, 0);
    }
    snprintf(m->prefix, sizeof m->prefix, "blocks.%d.mlp.%s", index, n_experts ? "shared." : "");
    if (width) layer->mlp = mlp_of(m, width, h->bias);
}

static void load_tokenizer(Model *m) {
    const Header *h = &m->h;
    m->ends = take(m, U32, 1, h->n_tokens, "tokenizer.ends", "");
    for (int i = 1; i < h->n_tokens; i++)
        if (m->ends[i] < m->ends[i - 1]) broken(m, "its tokens overlap");
    m->token_bytes = take(m, U8, 1, m->ends[h->n_tokens - 1], "tokenizer.bytes", "");
    m->sorted = take(m, U32, m->n_sorted = next_entry(m)->rows, 1, "tokenizer.sorted", "");
    for (uint64_t i = 0; i < m->n_sorted; i++)
        if (m->sorted[i] >= (uint32_t)h->n_tokens) broken(m, "it merges tokens that it has not");
    m->classes = take(m, U32, m->n_classes = next_entry(m)->rows, 3, "tokenizer.classes", "");
    uint64_t n = next_entry(m)->cols;
    const char *text = take(m, U8, 1, n, "chat", ""), *end = text + n;
    if (n && end[-1]) broken(m, "what stands around its turns has no end");
    for (int i = 0; i < N_AROUND && text < end; i++, text += strlen(text) + 1) m->chat[i] = text;
}

static void load(Model *m, const char *path) {
    struct stat status;
    Header *h = &m->h;
    int file = open(m->path = path, O_RDONLY);
    if (file < 0 || fstat(file, &status) || !S_ISREG(status.st_mode)) refuse("%s cannot be read.", path);
    /* The header, what it says of the file, and then its sum. */
    uint64_t size = (uint64_t)status.st_size;
    if (size < sizeof *h) refuse("%s is no model, or is truncated: it has %llu bytes.", path, (unsigned long long)size);
    m->bytes = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (m->bytes == MAP_FAILED) refuse("%s cannot be mapped into memory.", path);
    memcpy(h, m->bytes, sizeof *h);
    if (memcmp(h->magic, "SWITCHYD", 8)) refuse("%s is no model that python -m experiments.export wrote.", path);
    if (h->version != VERSION)
        refuse("%s is of version %u, and this program reads version %d: export both anew.", path, h->version, VERSION);
    if (h->size != size) refuse("%s is truncated or altered: its size is not what it was when it was written.", path);
    if (h->checksum != crc32(m->bytes + 16, size - 16)) refuse("%s is altered: its checksum is another.", path);
    if (h->n_tensors > (size - sizeof *h) / sizeof(Entry)) broken(m, "its table is too long");
    m->table = (const Entry *)(const void *)(m->bytes + sizeof *h);
    check_header(m);
    /* The tensors. */
    const uint32_t *experts = take(m, U32, h->n_layers, 2, "experts_and_chosen", "");
    m->embed = linear(m, h->vocab, h->d_model, h->int8, 0, "embed");
    if (h->position == LEARNED) m->positions = take(m, F32, h->context, h->d_model, "position.weight", "");
    if (h->position == ROPE) m->cos = take(m, F32, h->context, h->head_dim / 2, "cos", "");
    if (h->position == ROPE) m->sin = take(m, F32, h->context, h->head_dim / 2, "sin", "");
    m->layers = allocate(h->n_layers, sizeof(Layer));
    for (int i = 0; i < h->n_layers; i++) load_layer(m, i, experts[2 * i], experts[2 * i + 1]);
    m->prefix[0] = 0;
    m->norm = norm_of(m, "norm");
    m->head = h->tied ? m->embed : linear(m, h->vocab, h->d_model, h->int8, 0, "head");
    load_tokenizer(m);
    if (m->at != h->n_tensors) broken(m, "it has more tensors than one");
    /* Room for what one token's pass needs: each more than the largest of them needs. */
    float **rooms[] = {&m->x, &m->h_D, &m->q, &m->attended, &m->att, &m->z, &m->act, &m->y, &m->score, &m->rank,
                       &m->weight, &m->logits};
    uint64_t most = 2 * (uint64_t)m->widest + (uint64_t)h->context;
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) *rooms[i] = allocate(most, sizeof(float));
    m->chosen = allocate(most, sizeof(int)), m->candidates = allocate(most, sizeof(Candidate));
}

/* --- The network */
/* The sum of w[i] x[i], summed in 8 lanes; of w that is null the one in int8. */
static float dot(const float *w, const int8_t *q, const float *x, int n) {
    float lane[8] = {0}, sum = 0;
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) lane[j] += (w ? w[i + j] : q[i + j]) * x[i + j];
    for (; i < n; i++) sum += (w ? w[i] : q[i]) * x[i];
    for (int j = 0; j < 8; j++) sum += lane[j];
    return sum;
}

/* W x + b: (cols) -> (rows); an int8 row is summed group by group. */
static void apply(const Linear *w, const float *x, float *y) {
#pragma omp parallel for schedule(static) if ((int64_t)w->rows * w->cols >= 1 << 16) /* less is not worth it */
    for (int r = 0; r < w->rows; r++) {
        size_t row = (size_t)r * w->cols;
        int group = w->f ? w->cols : w->cols / w->n_groups;
        y[r] = (w->bias ? w->bias[r] : 0) + (w->f ? dot(w->f + row, NULL, x, group) : 0);
        for (int g = 0; g < w->n_groups; g++)
            y[r] += w->scale[(size_t)r * w->n_groups + g] * dot(NULL, w->q + row + g * group, x + g * group, group);
    }
}

/* y = x less its mean (for LAYER), over the root of its mean square, times the weight, plus the bias. */
static void normalize(const Norm *norm, int kind, float eps, int n, const float *x, float *y) {
    double mean = 0, square = 0;
    for (int i = 0; kind == LAYER && i < n; i++) mean += (double)x[i] / n;
    for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    double factor = 1 / sqrt(square / n + eps);
    for (int i = 0; i < n; i++)
        y[i] = (float)((x[i] - mean) * factor) * norm->weight[i] + (norm->bias ? norm->bias[i] : 0);
}

/* Queries or keys: their norm, of each head or all, then pairs (i, i + dim / 2) turned by the angles of the place. */
static void place_heads(const Model *m, const Norm *norm, float *x, int n_heads, size_t place) {
    int dim = m->h.head_dim, half = dim / 2, width = m->h.qk_norm == QK_HEAD ? dim : dim * n_heads;
    for (int i = 0; m->h.qk_norm != QK_NONE && i < dim * n_heads; i += width)
        normalize(norm, RMS, m->h.norm_eps, width, x + i, x + i);
    for (int head = 0; m->h.position == ROPE && head < n_heads; head++, x += dim)
        for (int i = 0; i < half; i++) {
            float a = x[i], b = x[i + half], cos = m->cos[place * half + i], sin = m->sin[place * half + i];
            x[i] = a * cos - b * sin, x[i + half] = b * cos + a * sin;
        }
}

static void softmax(float *x, int n) {
    float most = x[0], sum = 0;
    for (int i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int i = 0; i < n; i++) sum += x[i] = expf(x[i] - most);
    for (int i = 0; i < n; i++) x[i] /= sum;
}

static void attend(Model *m, Layer *layer, int at, int place) {
    const Header *h = &m->h;
    int dim = h->head_dim, shared = h->n_heads / h->n_kv_heads, n = at - m->start + 1;
    size_t d_kv = (size_t)h->n_kv_heads * dim;
    /* Queries; keys and values into the cache. */
    apply(&layer->q, m->h_D, m->q);
    apply(&layer->k, m->h_D, layer->keys + at * d_kv);
    apply(&layer->v, m->h_D, layer->values + at * d_kv);
    place_heads(m, &layer->q_norm, m->q, h->n_heads, (size_t)place);
    place_heads(m, &layer->k_norm, layer->keys + at * d_kv, h->n_kv_heads, (size_t)place);
    /* Each head over its document so far. */
    for (int head = 0; head < h->n_heads; head++) {
        float *q = m->q + head * dim, *out = m->attended + head * dim;
        size_t first = m->start * d_kv + head / shared * dim;
        const float *key = layer->keys + first, *value = layer->values + first;
        for (int s = 0; s < n; s++, key += d_kv) m->att[s] = dot(key, NULL, q, dim) / sqrtf((float)dim);
        softmax(m->att, n);
        memset(out, 0, dim * sizeof *out);
        for (int s = 0; s < n; s++, value += d_kv)
            for (int i = 0; i < dim; i++) out[i] += m->att[s] * value[i];
    }
    apply(&layer->o, m->attended, m->y);
}

/* y += weight * down(act(up(x))) */
static void add_mlp(Model *m, const Mlp *mlp, float weight) {
    int width = mlp->down.cols, activation = m->h.activation;
    apply(&mlp->up, m->h_D, m->z);
    for (int i = 0; i < width; i++) {
        float z = m->z[i];
        if (activation == SWIGLU) m->act[i] = z / (1 + expf(-z)) * m->z[i + width];
        else if (activation == GELU) m->act[i] = 0.5f * z * (1 + erff(z * 0.70710678f));
        else if (activation == GELU_TANH) m->act[i] = 0.5f * z * (1 + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
        else m->act[i] = z > 0 ? z * z : 0;
    }
    apply(&mlp->down, m->act, m->z);
    for (int i = 0; i < m->h.d_model; i++) m->y[i] += weight * m->z[i];
}

/* The index of the largest of x, the first of equals. */
static int largest(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) best = x[i] > x[best] ? i : best;
    return best;
}

/* The K experts of the token, and their weights: scores of those whose score (+ bias) is largest, in the best groups of
   neighbours. Without a bias logits order them, which tell apart scores that round to the same. */
static void route(Model *m, const Layer *layer) {
    const Header *h = &m->h;
    int n = layer->n_experts, members = n / h->groups;
    float sum = 0, *score = m->score, *rank = m->rank, *left = m->rank + n, *value = m->weight;
    apply(&layer->router, m->h_D, rank);
    for (int e = 0; e < n; e++) score[e] = h->score == SIGMOID ? 1 / (1 + expf(-rank[e])) : rank[e];
    if (h->score == SOFTMAX) softmax(score, n);
    for (int e = 0; layer->selection_bias && e < n; e++) rank[e] = score[e] + layer->selection_bias[e];
    /* A group is worth the sum of its best members. Whoever has been taken, and who is left out, ranks at -infinity. */
    memcpy(left, layer->selection_bias ? rank : score, n * sizeof *left);
    for (int g = 0; h->groups > 1 && g < h->groups; g++) {
        value[g] = 0;
        for (int i = 0; i < h->group_top && i < members; i++) {
            int best = g * members + largest(left + g * members, members);
            value[g] += left[best], left[best] = -INFINITY;
        }
    }
    memcpy(left, rank, n * sizeof *left);
    for (int i = 0; h->groups > 1 && i < h->k_groups; i++) value[largest(value, h->groups)] = -INFINITY;
    for (int e = 0; h->groups > 1 && e < n; e++)
        if (value[e / members] != -INFINITY) left[e] = -INFINITY;
    for (int i = 0; i < layer->n_chosen; i++) {
        int e = m->chosen[i] = largest(left, n);
        left[e] = -INFINITY, sum += m->weight[i] = score[e];
    }
    float over = !h->renormalize ? 1 : sum > 1.17549435e-38f ? sum : 1.17549435e-38f;
    for (int i = 0; i < layer->n_chosen; i++) m->weight[i] = m->weight[i] / over * h->scale;
}

/* One token at index `at` of the window; the logits of the next one are left in m->logits. */
static void forward(Model *m, int token, int at) {
    const Header *h = &m->h;
    const Linear *w = &m->embed;
    int d = h->d_model, place = at - m->start, n_groups = w->n_groups;
    size_t row = (size_t)token * d;
    for (int i = 0; i < d; i++) {
        m->x[i] = w->f ? w->f[row + i] : w->q[row + i] * w->scale[(size_t)token * n_groups + i / (d / n_groups)];
        if (h->position == LEARNED) m->x[i] += m->positions[(size_t)place * d + i];
    }
    for (int l = 0; l < h->n_layers; l++) {
        Layer *layer = m->layers + l;
        normalize(&layer->attn_norm, h->norm, h->norm_eps, d, m->x, m->h_D);
        attend(m, layer, at, place);
        for (int i = 0; i < d; i++) m->x[i] += m->y[i], m->y[i] = 0;
        normalize(&layer->mlp_norm, h->norm, h->norm_eps, d, m->x, m->h_D);
        /* The routed experts; the dense MLP or the shared experts, which take every token. */
        if (layer->experts) route(m, layer);
        for (int i = 0; i < layer->n_chosen; i++) add_mlp(m, layer->experts + m->chosen[i], m->weight[i]);
        float gate = INFINITY;
        if (layer->shared_gate.rows) apply(&layer->shared_gate, m->h_D, &gate);
        if (layer->mlp.up.rows) add_mlp(m, &layer->mlp, 1 / (1 + expf(-gate)));
        for (int i = 0; i < d; i++) m->x[i] += m->y[i];
        if (!m->show_experts || !layer->experts) continue;
        fprintf(stderr, "token %d id %d layer %d:", at, token, l);
        for (int i = 0; i < layer->n_chosen; i++) fprintf(stderr, " %d=%.6g", m->chosen[i], m->weight[i]);
        fputc('\n', stderr);
    }
    normalize(&m->norm, h->norm, h->norm_eps, d, m->x, m->h_D);
    apply(&m->head, m->h_D, m->logits);
    if (token == h->document_end) m->start = at + 1;
}

/* --- The tokenizer */
/* Room for more tokens behind a text's last. */
static int *grow(Text *text, uint64_t more) {
    text->ids = realloc(text->ids, ((uint64_t)text->n + more + 1) * sizeof(int));
    if (!text->ids) refuse("there is not enough memory for the text.");
    return text->ids + text->n;
}

static uint32_t begin_of(const Model *m, int token) { return token ? m->ends[token - 1] : 0; }
static uint32_t length_of(const Model *m, int token) { return m->ends[token] - begin_of(m, token); }

/* The mergeable token of these bytes, or -1. */
static int token_of(const Model *m, const unsigned char *bytes, uint32_t n) {
    for (uint64_t low = 0, high = m->n_sorted; low < high;) {
        uint64_t middle = low + (high - low) / 2;
        int token = (int)m->sorted[middle];
        uint32_t length = length_of(m, token);
        int order = memcmp(m->token_bytes + begin_of(m, token), bytes, length < n ? length : n);
        if (!order && length == n) return token;
        if (!order) order = length < n ? -1 : 1;
        *(order < 0 ? &low : &high) = middle + (order < 0);
    }
    return -1;
}

/* Byte-pair encoding of a piece: neighbours that are the token with the lowest id are merged, the left of equals. */
static int encode_piece(const Model *m, const unsigned char *piece, int n, int *ids) {
    if ((ids[0] = token_of(m, piece, (uint32_t)n)) >= 0) return 1;
    for (int i = 0; i < n; i++)
        if ((ids[i] = token_of(m, piece + i, 1)) < 0) refuse("the tokenizer has no token for the byte %d.", piece[i]);
    for (int lowest, where = 0;; ids[where] = lowest) {
        lowest = -1;
        for (uint32_t i = 0, at = 0; i + 1 < (uint32_t)n; at += length_of(m, ids[i++])) {
            int token = token_of(m, piece + at, length_of(m, ids[i]) + length_of(m, ids[i + 1]));
            if (token >= 0 && (lowest < 0 || token < lowest)) lowest = token, where = (int)i;
        }
        if (lowest < 0) return n;
        memmove(ids + where + 1, ids + where + 2, (size_t)(--n - where - 1) * sizeof *ids);
    }
}

/* The character at `text`, and its bytes; refuses what is not UTF-8. */
static uint32_t character(const unsigned char *text, uint32_t n, uint32_t *length) {
    uint32_t lead = text[0], code;
    *length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    int valid = *length && *length <= n;
    code = *length == 1 ? lead : lead & (0x7Fu >> *length);
    for (uint32_t i = 1; valid && i < *length; i++)
        valid = (text[i] & 0xC0) == 0x80, code = code << 6 | (text[i] & 0x3F);
    if (!valid) refuse("the prompt is not UTF-8.");
    return code;
}

static int class_of(const Model *m, uint32_t code) {
    for (const uint32_t *row = m->classes; row < m->classes + 3 * m->n_classes; row += 3)
        if (code >= row[0] && code <= row[1]) return (int)row[2];
    return OTHER;
}
static int is_break(uint32_t code) { return code == '\r' || code == '\n'; }

/* How many of the n characters at `code` make the first piece, by the pattern of moe/data/tokenizer.py:
   '(?i:[sdmt]|ll|ve|re) | [^\r\n\p{L}\p{N}]?+\p{L}++ | \p{N}{1,2}+ | ?[^\s\p{L}\p{N}]++[\r\n]*+
   | \s++$ | \s*[\r\n] | \s+(?!\S) | \s */
static int word(const uint32_t *code, const unsigned char *kind, int n) {
    int i = 0, after_break = 0;
    if (code[0] == '\'' && n > 1) {
        uint32_t a = code[1] == 0x17F ? 's' : code[1] | 32, b = n > 2 ? code[2] | 32 : 0; /* U+017F is an s too */
        if (a == 's' || a == 'd' || a == 'm' || a == 't') return 2;
        if ((a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e')) return 3;
    }
    /* Letters, and one character before them; two digits; other characters, a space before and breaks behind them. */
    i = kind[0] != LETTER && kind[0] != NUMBER && !is_break(code[0]);
    int first = i;
    while (i < n && kind[i] == LETTER) i++;
    if (i > first) return i;
    if (kind[0] == NUMBER) return n > 1 && kind[1] == NUMBER ? 2 : 1;
    i = first = code[0] == ' ';
    while (i < n && kind[i] == OTHER) i++;
    while (i > first && i < n && is_break(code[i])) i++;
    if (i > first) return i;
    /* Space: to the end, else to its last line break, else all but its last character. */
    for (i = 0; i < n && kind[i] == SPACE; i++)
        if (is_break(code[i])) after_break = i + 1;
    return i == n ? n : after_break ? after_break : i > 1 ? i - 1 : 1;
}

/* Appends the ids of n_bytes of text; at most as many as these. */
static void encode(const Model *m, Text *text, const char *of, size_t n_bytes) {
    const unsigned char *bytes = (const unsigned char *)of;
    uint32_t n = 0, *code = allocate(n_bytes, sizeof *code), *begin = allocate(n_bytes + 1, sizeof *begin);
    unsigned char *kind = allocate(n_bytes, 1);
    if (m->h.split == IDS_ONLY && n_bytes) refuse("this tokenizer's way with text is not in run.c: give ids (-i).");
    for (uint32_t at = 0, length; at < n_bytes; at += length, n++) {
        begin[n] = at, code[n] = character(bytes + at, (uint32_t)n_bytes - at, &length);
        kind[n] = (unsigned char)class_of(m, code[n]);
        begin[n + 1] = at + length;
    }
    grow(text, n_bytes);
    for (uint32_t i = 0, end; i < n; i = end) {
        end = i + (m->h.split == WORDS ? (uint32_t)word(code + i, kind + i, (int)(n - i)) : 1);
        text->n += encode_piece(m, bytes + begin[i], (int)(begin[end] - begin[i]), text->ids + text->n);
    }
    free(code), free(begin), free(kind);
}

/* The same of a text in which special tokens are the byte 255, their id in decimal and one character more. */
static void encode_specials(const Model *m, Text *text, const char *of) {
    for (char *end; *of; of = end + (*end != 0)) {
        size_t n = strcspn(of, "\xFF");
        encode(m, text, of, n);
        long id = strtol(of += n + (of[n] != 0), &end, 10);
        if (id < 0 || id >= m->h.vocab) broken(m, "its turns have a token that it has not");
        if (end > of) *grow(text, 1) = (int)id, text->n++;
    }
}

/* --- Choosing tokens, by the options of the command line */
static const char *prompt = "";
static double temperature = 0.8, top_p = 1;
static int n_new = 200, prompt_is_ids, show_ids, score, chat;
static FILE *logits;
static uint64_t state; /* of the draws */
/* Reads what is not read yet, for the logits after it. A full context keeps its last half, with positions from 0. */
static void read_text(Model *m, Text *text) {
    int context = m->h.context;
    if (text->n - text->begin > context) text->begin = text->n - (context > 1 ? context / 2 : 1), text->read = 0;
    if (!text->read) m->start = 0;
    for (int *next; (next = text->ids + text->begin + text->read) < text->ids + text->n; text->read++)
        forward(m, *next, text->read);
    for (int i = 0; i < m->h.vocab; i++)
        if (!isfinite(m->logits[i])) refuse("the model's logits have NaN or infinity among them.");
}

static double uniform(void) { /* [0, 1), splitmix64 */
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u, z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

static int compare_candidates(const void *a, const void *b) {
    const Candidate *p = a, *q = b;
    return p->mass != q->mass ? (p->mass < q->mass) - (p->mass > q->mass) : p->token - q->token;
}

/* softmax(logits / temperature), of it the smallest set of tokens whose mass is at least top_p, and one draw. */
static int choose(const Model *m) {
    Candidate *of = m->candidates;
    int n = m->h.vocab, best = largest(m->logits, n), kept = 0;
    double total = 0, mass = 0, most = m->logits[best];
    if (temperature == 0) return best;
    for (int i = 0; i < n; i++) of[i] = (Candidate){exp((m->logits[i] - most) / temperature), i}, total += of[i].mass;
    qsort(of, (size_t)n, sizeof *of, compare_candidates);
    while (kept < n && (kept == 0 || mass < top_p * total)) mass += of[kept++].mass;
    double left = uniform() * mass;
    for (int i = 0; i < kept - 1; i++)
        if ((left -= of[i].mass) < 0) return of[i].token;
    return of[kept - 1].token;
}

/* --- The command line */
static double number(const char *option, const char *text, double high, int whole) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0 && value <= high) || (whole && value != floor(value)))
        refuse("%s %s is not a %snumber from 0 to %g.", option, text, whole ? "whole " : "", high);
    return value;
}

static const char usage[] =
    "usage: run model.bin [-p TEXT | -i IDS] [-n TOKENS] [-t TEMPERATURE] [--top-p P] [--seed S]\n"
    "                     [--ids] [--experts] [--logits FILE] [--score | --chat]\n"
    "  -p, -i         the prompt, or its token ids, such as \"84 111\"; of a long one the end is read\n"
    "  -n TOKENS      at most this many new tokens (200); the model may end the text earlier\n"
    "  -t, --top-p    temperature (0.8; 0 is greedy), and the mass of the most probable tokens to draw from (1)\n"
    "  --seed S       of the draws (0)\n"
    "  --ids, --experts  print ids, not text; and every token's experts and their weights, on stderr\n"
    "  --logits FILE  write the V logits before every choice, float32\n"
    "  --score        of every line of the standard input, a text or with --ids token ids, print -log p of each token\n"
    "                 after the first, in nats; nothing is continued\n"
    "  --chat         answer every line of the standard input; -p is what the system says before\n";

/* A line of the standard input without its end, kept until the next one is read; null when there are no more. */
static char *read_line(void) {
    static char *line;
    static size_t room;
    if (getline(&line, &room, stdin) < 0) return NULL;
    line[strcspn(line, "\n")] = 0;
    return line;
}

/* A text, or one of ids in words; an empty one is a new document. */
static Text read_prompt(const Model *m, const char *words, int is_ids) {
    Text text = {NULL, 0, 0, 0};
    grow(&text, strlen(words));
    if (!is_ids) encode(m, &text, words, strlen(words));
    for (char *end; is_ids && *words; words = end + strspn(end, " ,")) {
        long value = strtol(words, &end, 10);
        if (end == words || value < 0 || value >= m->h.vocab || (*end && *end != ' ' && *end != ','))
            refuse("-i takes ids from 0 to %d with spaces or commas between them, not %s.", m->h.vocab - 1, words);
        text.ids[text.n++] = (int)value;
    }
    if (!text.n) text.ids[text.n++] = m->h.eot;
    return text;
}

/* Of every line -log p of each token after the first. */
static void score_lines(Model *m) {
    for (char *line; (line = read_line());) {
        Text text = read_prompt(m, line, show_ids);
        int n = text.n;
        for (text.n = 1; text.n < n; text.n++) {
            read_text(m, &text);
            double most = m->logits[largest(m->logits, m->h.vocab)], total = 0;
            for (int i = 0; i < m->h.vocab; i++) total += exp(m->logits[i] - most);
            printf("%.6f ", log(total) + most - m->logits[text.ids[text.n]]);
        }
        putchar('\n'), free(text.ids);
    }
}

/* Continues the text, of which the end is read if it is long, by at most n_new tokens. A document's end ends it, and
   so do the tokens of `end`: neither is shown, and `end` stands there at last. */
static void continue_text(Model *m, Text *text, const Text *end) {
    int shown = text->n, from = text->n, begin = text->n > m->h.context ? text->n - m->h.context : 0;
    if (begin != text->begin) text->begin = begin, text->read = 0;
    grow(text, (uint64_t)n_new + (uint64_t)end->n);
    for (int i = 0, going = n_new > 0; going; i++) {
        read_text(m, text);
        if (logits) fwrite(m->logits, sizeof(float), m->h.vocab, logits);
        int token = choose(m), first = text->n + 1 - end->n;
        text->ids[text->n++] = token;
        if (token == m->h.eot) going = 0, text->n--;
        else if (end->n && first >= from && !memcmp(text->ids + first, end->ids, end->n * sizeof token))
            going = 0, text->n = first;
        else going = i + 1 < n_new;
        /* What may become the end is held back. */
        for (; shown + going * end->n < text->n; shown++) {
            token = text->ids[shown];
            if (show_ids) printf("%d ", token);
            else if (token < m->h.n_tokens) fwrite(m->token_bytes + begin_of(m, token), 1, length_of(m, token), stdout);
        }
        fflush(stdout);
    }
    for (int i = 0; i < end->n; i++) text->ids[text->n++] = end->ids[i];
    putchar('\n');
}

/* Every line of the standard input is a turn of the user's; prompt is what the system says before. */
static void converse(Model *m) {
    Text text = {NULL, 0, 0, 0}, end = text;
    encode_specials(m, &end, m->chat[BEHIND_REPLY]);
    const char *before = m->chat[*prompt ? BEFORE_SYSTEM : BEFORE_USER], *reply = m->chat[BEFORE_REPLY];
    const char *system = prompt, *behind = *system ? m->chat[BEHIND_SYSTEM] : "";
    for (char *line; (line = read_line()); before = m->chat[BEFORE_NEXT], system = behind = "") {
        size_t size = strlen(before) + strlen(system) + strlen(behind) + strlen(line) + strlen(reply) + 1;
        char *turn = allocate(size, 1);
        if (strchr(line, '\xFF')) refuse("the prompt is not UTF-8.");
        snprintf(turn, size, "%s%s%s%s%s", before, system, behind, line, reply);
        encode_specials(m, &text, turn), free(turn);
        continue_text(m, &text, &end);
    }
}

int main(int argc, char **argv) {
    static Model m;
    if (argc < 2 || argv[1][0] == '-') return fputs(usage, stderr), 2;
    for (int i = 2; i < argc; i++) {
        const char *option = argv[i];
        if (!strcmp(option, "--ids")) show_ids = 1;
        else if (!strcmp(option, "--experts")) m.show_experts = 1;
        else if (!strcmp(option, "--score")) score = 1;
        else if (!strcmp(option, "--chat")) chat = 1;
        else if (++i == argc) refuse("%s needs a value, or is no option: see run without arguments.", option);
        else if (!strcmp(option, "-p") || !strcmp(option, "-i")) prompt = argv[i], prompt_is_ids = option[1] == 'i';
        else if (!strcmp(option, "-n")) n_new = (int)number(option, argv[i], 1e8, 1);
        else if (!strcmp(option, "-t")) temperature = number(option, argv[i], 1e30, 0);
        else if (!strcmp(option, "--top-p")) top_p = number(option, argv[i], 1, 0);
        else if (!strcmp(option, "--seed")) state = (uint64_t)number(option, argv[i], 9e15, 1);
        else if (strcmp(option, "--logits")) refuse("%s is no option: see run without arguments.", option);
        else if (!(logits = fopen(argv[i], "wb"))) refuse("%s cannot be written.", argv[i]);
    }
    load(&m, argv[1]);
    if (chat && !m.chat[BEFORE_NEXT]) refuse("%s does not know how a conversation is spelt.", argv[1]);
    if (chat && *prompt && !*m.chat[BEFORE_SYSTEM]) refuse("this model's conversations have no system message.");
    Text text = read_prompt(&m, chat ? "" : prompt, prompt_is_ids), none = {NULL, 0, 0, 0};
    if (chat) converse(&m);
    else if (score) score_lines(&m);
    else continue_text(&m, &text, &none);
    if (logits && (ferror(logits) || fclose(logits))) refuse("the logits cannot be written.");
}
