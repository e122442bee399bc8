/* vlmtrim: runs bundles that export-vlm made. The C interface, for every language that can call C.
 *
 * A model is an opened bundle; threads may share it. A session is one conversation on it with its own caches, of one
 * thread at a time; vlmtrim_cancel alone may come from another one. A session keeps its model alive.
 *
 * Functions return a status; what went wrong is told in one sentence by vlmtrim_error, of the last call that failed in
 * the same thread. Texts are UTF-8, ended by a zero. Structs begin with their size, so that they may grow: set it to
 * sizeof, the rest to zero for the defaults.
 */
#ifndef VLMTRIM_H
#define VLMTRIM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define VLMTRIM_API __attribute__((visibility("default")))
#else
#define VLMTRIM_API
#endif

typedef struct vlmtrim_model vlmtrim_model;
typedef struct vlmtrim_session vlmtrim_session;

typedef enum {
  VLMTRIM_OK = 0,
  VLMTRIM_BAD_BUNDLE = 1, /* the folder is no bundle, or a damaged one */
  VLMTRIM_REFUSED = 2,    /* what was asked for cannot be done; the sentence says what is allowed */
  VLMTRIM_FAILED = 3      /* out of memory, or a mistake of this library */
} vlmtrim_status;

typedef enum {
  VLMTRIM_GOES_ON = 0,
  VLMTRIM_EOS = 1,      /* the model ended the answer */
  VLMTRIM_STOP = 2,     /* ended before a stop text */
  VLMTRIM_LENGTH = 3,   /* cut after max_new_tokens */
  VLMTRIM_CAPACITY = 4, /* cut where the caches were full */
  VLMTRIM_CANCELLED = 5 /* by vlmtrim_cancel or the callback */
} vlmtrim_ended;

/* Version of the library, e.g. "0.1.0". */
VLMTRIM_API const char* vlmtrim_version(void);
/* What the last call that failed in this thread has to say; "" where none did. Holds until the next call. */
VLMTRIM_API const char* vlmtrim_error(void);

typedef struct {
  size_t size;
  const char* backend;     /* "auto", "ort-cpu", "ort-cuda", and "tensorrt", "tensorrt-rtx" where they are built in;
                              NULL for auto */
  const char* onnxruntime; /* path of ONNX Runtime's library; NULL: $VLMTRIM_ONNXRUNTIME, else where it was found */
  int32_t threads;         /* of the CPU; 0 for one per core */
  int32_t exact;           /* not 0: multiply packed weights by float32 activations, exactly and slowly */
  int32_t verify;          /* not 0: hash every byte, also of large files that were hashed before */
  const char* tensorrt;    /* path of TensorRT's, or TensorRT-RTX's library; NULL: $VLMTRIM_TENSORRT or
                              $VLMTRIM_TENSORRT_RTX, else where it was found */
  const char* cuda_graphs; /* how TensorRT's decode steps are replayed: "auto", "capture" or "off"; NULL for auto */
} vlmtrim_model_options;

/* Opens a bundle's folder; `options` may be NULL. */
VLMTRIM_API vlmtrim_status vlmtrim_model_open(const char* folder, const vlmtrim_model_options* options,
                                              vlmtrim_model** model);
VLMTRIM_API void vlmtrim_model_close(vlmtrim_model* model);
/* JSON: family, backend, selection, max_seq_len, image_tokens, image_token_id. Holds as long as the model. */
VLMTRIM_API const char* vlmtrim_model_description(const vlmtrim_model* model);

VLMTRIM_API vlmtrim_status vlmtrim_session_open(vlmtrim_model* model, vlmtrim_session** session);
VLMTRIM_API void vlmtrim_session_close(vlmtrim_session* session);
/* A new conversation; `system` stands before the first question, NULL for nothing. */
VLMTRIM_API vlmtrim_status vlmtrim_session_reset(vlmtrim_session* session, const char* system);
/* Of a bundle with a cache policy: the share of the candidates that stays (below 0: as it is), and the decode steps
 * between two rounds while an answer grows (0: as they are). */
VLMTRIM_API vlmtrim_status vlmtrim_session_caches(vlmtrim_session* session, double share, int64_t every);
/* Lets another bundle, of --method none --emit-guide, show one of --method guided which visual tokens to keep. It is
 * asked first, every question with pictures in a conversation of its own; where the geometric mean of its tokens'
 * probabilities reaches `exit_confidence` its answer is given, and every question then opens a new conversation; 0:
 * never. Begins a new conversation; a session has one guide, and no vlmtrim_generate_ids then. */
VLMTRIM_API vlmtrim_status vlmtrim_session_guide(vlmtrim_session* session, vlmtrim_model* small,
                                                 double exit_confidence);
/* Ends the answer that is being generated behind its next token. From any thread. */
VLMTRIM_API void vlmtrim_cancel(vlmtrim_session* session);

typedef enum {
  VLMTRIM_TEXT = 0,
  VLMTRIM_FILE = 1,   /* a picture: `text` is its path */
  VLMTRIM_BYTES = 2,  /* a picture: the contents of a file, `data` of `length` bytes */
  VLMTRIM_PIXELS = 3, /* a picture: `data` of `width` x `height` pixels of `channels` bytes (1: grey, 3: RGB, 4: RGB and
                         one that is ignored), `stride` bytes from row to row */
  VLMTRIM_VIDEO = 4   /* a video: `frames`, pictures of one size in order, `frame_count` of them, `fps` a second as they
                         are given (0 for 2). All of them are seen: take as many out of a film as the model should see */
} vlmtrim_kind;

/* A piece of a question: words, a picture, or a video. Pictures before all words stand where the template puts them,
 * others where they are. */
typedef struct vlmtrim_part {
  vlmtrim_kind kind;
  const char* text;
  const uint8_t* data;
  size_t length;
  int32_t width, height, channels;
  int64_t stride;
  const struct vlmtrim_part* frames;
  size_t frame_count;
  double fps;
} vlmtrim_part;

typedef struct {
  size_t size;
  int32_t max_new_tokens; /* 0 for 128 */
  double temperature;     /* 0 is greedy */
  int64_t top_k;          /* 0 for all tokens */
  double top_p;           /* 0 for 1 */
  int32_t has_seed;       /* 0 draws a fresh one */
  uint64_t seed;
  const char* const* stop; /* texts that end an answer, `stops` of them */
  size_t stops;
  const float* guide; /* what the visual tokens are ranked by, `guides` of them; for bundles of --method guided */
  size_t guides;
} vlmtrim_generate_options;

/* One token of an answer; `text`, of `text_length` bytes and a zero, may be empty, and holds until the callback
 * returns.
 */
typedef struct {
  size_t size;
  int64_t index, token;
  const char* text;
  size_t text_length;
  vlmtrim_ended ended;
} vlmtrim_step;

/* Called with every token, in the thread that asked; anything but 0 ends the answer. */
typedef int32_t (*vlmtrim_callback)(void* user, const vlmtrim_step* step);

/* An answer. What it points to holds until the session's next call. */
typedef struct {
  size_t size;
  const char* text; /* of `text_length` bytes, zeros may be among them, and a zero */
  size_t text_length;
  const int64_t* tokens;
  size_t token_count;
  vlmtrim_ended ended;
  int64_t visual, kept;         /* visual tokens of the question, and how many the last layers keep */
  const int64_t* kept_by_layer; /* NULL unless layers choose by themselves */
  size_t layers;
  double vision_seconds, prefill_seconds, decode_seconds; /* since the session was opened or reset */
  int64_t decode_steps;
  const char* caches; /* JSON of what a cache policy left: policy, share, visual_by_layer, entries_by_layer, bytes,
                         allocated; NULL without one */
  double caches_seconds;
  int32_t guided, exited; /* not 0: a guide was asked; its answer is this one, and so are visual, kept and the times */
  double confidence;      /* geometric mean of the probabilities of the guide's tokens */
  double guide_seconds, guided_seconds; /* that the guide took, and behind it the guided bundle */
} vlmtrim_answer;

/* Asks. `options`, `callback` and `answer` may be NULL. */
VLMTRIM_API vlmtrim_status vlmtrim_generate(vlmtrim_session* session, const vlmtrim_part* parts, size_t count,
                                            const vlmtrim_generate_options* options, vlmtrim_callback callback,
                                            void* user, vlmtrim_answer* answer);
/* The same with token ids, which hold the image (or video) token once for each of the pictures: for bundles without
 * prompt.json; or all of their tokens. The text of the answer is empty where the library does not know the bundle's
 * tokenizer. */
VLMTRIM_API vlmtrim_status vlmtrim_generate_ids(vlmtrim_session* session, const int64_t* ids, size_t id_count,
                                                const vlmtrim_part* pictures, size_t picture_count,
                                                const vlmtrim_generate_options* options, vlmtrim_callback callback,
                                                void* user, vlmtrim_answer* answer);

#ifdef __cplusplus
}
#endif

#endif
