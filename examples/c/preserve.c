/*
 * preserve RUNTIME_DIR SESSION FILE
 *
 * Copies FILE into a memfd and gives it into luod's custody: session SESSION, entry "file", metadata: FILE as it was given.
 * Prints the session's id. Uses nothing of luod but what docs/protocol.md says; needs libc only.
 *
 * Exit status: 0 done; 1 luod said no, the reason is on stderr; 2 usage, or a local error; 3 no luod.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { PACKET_BYTES = 65536, PACKET_FDS = 253, ID_BYTES = 16 };
enum { DONE = 0, REFUSED = 1, LOCAL_ERROR = 2, NO_LUOD = 3, LOST = 4 };

static void die(const char *what)
{
	perror(what);
	exit(LOCAL_ERROR);
}

/* ---- msgpack, as far as these requests need it. */

struct out {
	size_t size;
	unsigned char data[PACKET_BYTES];
};

static void put(struct out *o, const void *data, size_t size)
{
	if (size > sizeof o->data - o->size) {
		fprintf(stderr, "the request does not fit into a packet\n");
		exit(LOCAL_ERROR);
	}
	memcpy(o->data + o->size, data, size);
	o->size += size;
}

static void put_head(struct out *o, unsigned char head, unsigned bytes, uint32_t value)
{
	unsigned char b[5] = { head };
	for (unsigned i = 0; i < bytes; i++)
		b[1 + i] = (unsigned char)(value >> 8 * (bytes - 1 - i));
	put(o, b, 1 + bytes);
}

static void put_map(struct out *o, unsigned pairs) { put_head(o, (unsigned char)(0x80 | pairs), 0, 0); }
static void put_array(struct out *o, unsigned values) { put_head(o, (unsigned char)(0x90 | values), 0, 0); }
static void put_int(struct out *o, uint32_t value) { put_head(o, 0xce, 4, value); }

static void put_str(struct out *o, const char *text)
{
	size_t size = strlen(text);
	if (size > UINT16_MAX)
		size = UINT16_MAX; /* does not fit a packet anyway: put() says so */
	put_head(o, 0xda, 2, (uint32_t)size);
	put(o, text, size);
}

static void put_bin(struct out *o, const void *data, size_t size)
{
	put_head(o, 0xc6, 4, (uint32_t)size);
	put(o, data, size);
}

/* ---- msgpack of any kind, read: each function returns 0 when the bytes are not what it is for. */

struct in {
	const unsigned char *at, *end;
};

struct text {
	const char *at;
	size_t size;
};

struct value {
	enum { INT, STR, BIN, ARRAY, MAP, OTHER } is;
	uint64_t number; /* of an INT, as unsigned; number of values or pairs inside an ARRAY or MAP */
	struct text text; /* of a STR or BIN */
};

static int take(struct in *in, size_t size, const unsigned char **data)
{
	if ((size_t)(in->end - in->at) < size)
		return 0;
	*data = in->at;
	in->at += size;
	return 1;
}

static int take_number(struct in *in, unsigned bytes, uint64_t *number)
{
	const unsigned char *p;
	if (!take(in, bytes, &p))
		return 0;
	for (*number = 0; bytes--; p++)
		*number = *number << 8 | *p;
	return 1;
}

/* One value; of an array or a map its head only, what is inside follows. */
static int take_value(struct in *in, struct value *v)
{
	/* c0 to df: what it is, and how many bytes of number or length follow; 0xff: not used by the protocol. */
	static const unsigned char is[32] = { OTHER, 0xff, OTHER, OTHER, BIN, BIN, BIN, 0xff, 0xff, 0xff, OTHER, OTHER, INT, INT, INT, INT,
		INT, INT, INT, INT, 0xff, 0xff, 0xff, 0xff, 0xff, STR, STR, STR, ARRAY, ARRAY, MAP, MAP };
	static const unsigned char follow[32] = { 0, 0, 0, 0, 1, 2, 4, 0, 0, 0, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 0, 0, 0, 0, 0, 1, 2, 4, 2, 4, 2, 4 };
	const unsigned char *p;

	if (!take(in, 1, &p))
		return 0;
	unsigned head = *p;
	memset(v, 0, sizeof *v);
	if (head < 0x80 || head >= 0xe0) {
		v->is = INT;
		v->number = head;
	} else if (head < 0xa0) {
		v->is = head < 0x90 ? MAP : ARRAY;
		v->number = head & 0x0f;
	} else if (head < 0xc0) {
		v->is = STR;
		v->number = head & 0x1f;
	} else {
		if (is[head - 0xc0] == 0xff || !take_number(in, follow[head - 0xc0], &v->number))
			return 0;
		v->is = is[head - 0xc0];
	}
	if (v->is == STR || v->is == BIN) {
		if (!take(in, v->number, &p))
			return 0;
		v->text.at = (const char *)p;
		v->text.size = v->number;
	}
	return 1;
}

/* One value with all that is inside it. */
static int skip(struct in *in)
{
	uint64_t left = 1;
	while (left) {
		struct value v;
		if (!take_value(in, &v))
			return 0;
		left += v.is == MAP ? 2 * v.number : v.is == ARRAY ? v.number : 0;
		left--;
	}
	return 1;
}

static int same(struct text text, const char *other)
{
	return text.size == strlen(other) && !memcmp(text.at, other, text.size);
}

/* What of an answer is needed here. */
struct answer {
	unsigned char data[PACKET_BYTES];
	struct text type, code, message, entry;
	uint64_t seq, errno_;
};

static int parse(struct answer *a, size_t size)
{
	struct in in = { a->data, a->data + size };
	struct value map, key;

	if (!take_value(&in, &map) || map.is != MAP)
		return 0;
	while (map.number--) {
		if (!take_value(&in, &key) || key.is != STR)
			return 0;
		struct in before = in;
		struct value v;
		if (!take_value(&in, &v))
			return 0;
		if (same(key.text, "type") && v.is == STR)
			a->type = v.text;
		else if (same(key.text, "code") && v.is == STR)
			a->code = v.text;
		else if (same(key.text, "message") && v.is == STR)
			a->message = v.text;
		else if (same(key.text, "entry") && v.is == STR)
			a->entry = v.text;
		else if (same(key.text, "seq") && v.is == INT)
			a->seq = v.number;
		else if (same(key.text, "errno") && v.is == INT)
			a->errno_ = v.number;
		in = before;
		if (!skip(&in))
			return 0;
	}
	return in.at == in.end && a->type.size;
}

/* ---- The connection. */

static int connect_to(const char *runtime_dir, const char *endpoint)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", runtime_dir, endpoint);
	if (length < 0 || (size_t)length >= sizeof address.sun_path) {
		fprintf(stderr, "%s/%s is longer than a socket's path can be\n", runtime_dir, endpoint);
		exit(LOCAL_ERROR);
	}
	int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (sock < 0)
		die("socket");
	if (connect(sock, (struct sockaddr *)&address, sizeof address)) {
		int absent = errno == ENOENT || errno == ECONNREFUSED || errno == ENOTDIR;
		fprintf(stderr, "%s: %s\n", address.sun_path, strerror(errno));
		exit(absent ? NO_LUOD : LOCAL_ERROR);
	}
	return sock;
}

/* Send a request, with a fd unless that is -1. */
static void send_request(int sock, struct out *o, int fd)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec data = { o->data, o->size };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1 };

	if (fd >= 0) {
		memset(&control, 0, sizeof control);
		message.msg_control = &control;
		message.msg_controllen = sizeof control;
		control.head.cmsg_level = SOL_SOCKET;
		control.head.cmsg_type = SCM_RIGHTS;
		control.head.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
	}
	/* EPIPE and ECONNRESET: luod has closed. Why, if it said so, is where the answer would be. */
	if (sendmsg(sock, &message, MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET)
		die("sendmsg");
}

/* Receive a packet. 0 when the connection has ended. No answer here brings fds: what comes is closed. */
static size_t receive(int sock, unsigned char *data)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(PACKET_FDS * sizeof(int))];
	} control;
	struct iovec into = { data, PACKET_BYTES };
	struct msghdr message = { .msg_iov = &into, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	ssize_t size;

	/* ECONNRESET comes once, before what luod sent last. */
	while ((size = recvmsg(sock, &message, MSG_CMSG_CLOEXEC)) < 0)
		if (errno != ECONNRESET && errno != EINTR)
			die("recvmsg");
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t at = 0; CMSG_LEN(at + sizeof(int)) <= c->cmsg_len; at += sizeof(int)) {
			int fd;
			memcpy(&fd, CMSG_DATA(c) + at, sizeof fd);
			close(fd);
		}
	}
	if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		fprintf(stderr, "a packet was truncated\n");
		exit(LOCAL_ERROR);
	}
	return (size_t)size;
}

/* Send a request and wait for its answer, which has to be of this type. */
static int ask(int sock, struct out *o, int fd, uint64_t seq, const char *type, struct answer *a)
{
	memset(a, 0, sizeof *a);
	send_request(sock, o, fd);
	size_t size = receive(sock, a->data);
	if (!size)
		return LOST;
	if (!parse(a, size)) {
		fprintf(stderr, "an answer is not one message\n");
		exit(LOCAL_ERROR);
	}
	if (same(a->type, "fault") || (same(a->type, "refused") && a->seq == seq))
		return REFUSED;
	if (!same(a->type, type) || a->seq != seq) {
		/* "bulk" ends here too: no answer to these requests is that large. */
		fprintf(stderr, "%s was due, %.*s came\n", type, (int)a->type.size, a->type.at);
		exit(LOCAL_ERROR);
	}
	return DONE;
}

static int tell(int result, const char *request, const struct answer *a)
{
	if (result == REFUSED)
		fprintf(stderr, "%s: %.*s: %.*s (%.*s, errno %u)\n", request, (int)a->type.size, a->type.at, (int)a->message.size, a->message.at,
			(int)a->code.size, a->code.at, (unsigned)a->errno_);
	if (result == LOST)
		fprintf(stderr, "%s: luod ended the connection without an answer\n", request);
	return result == DONE ? DONE : REFUSED;
}

/* ---- The requests. */

static void begin(struct out *o, unsigned pairs, const char *type, uint32_t seq)
{
	o->size = 0;
	put_map(o, pairs);
	put_str(o, "type");
	put_str(o, type);
	put_str(o, "seq");
	put_int(o, seq);
}

static int hello(int sock, struct out *o, struct answer *a)
{
	begin(o, 5, "hello", 1);
	put_str(o, "low");
	put_int(o, 1);
	put_str(o, "high");
	put_int(o, 1);
	put_str(o, "client");
	put_str(o, "preserve.c");
	return ask(sock, o, -1, 1, "welcome", a);
}

static int open_session(int sock, struct out *o, struct answer *a, const char *session, const unsigned char *id)
{
	begin(o, 4, "open", 2);
	put_str(o, "session");
	put_str(o, session);
	put_str(o, "session_id");
	put_bin(o, id, ID_BYTES);
	return ask(sock, o, -1, 2, "opened", a);
}

static int preserve(int sock, struct out *o, struct answer *a, int fd, const char *metadata)
{
	begin(o, 3, "preserve", 3);
	put_str(o, "entries");
	put_array(o, 1);
	put_map(o, 2);
	put_str(o, "name");
	put_str(o, "file");
	put_str(o, "metadata");
	put_bin(o, metadata, strlen(metadata));
	return ask(sock, o, fd, 3, "preserved", a);
}

static int finalize(int sock, struct out *o, struct answer *a, const unsigned char *id)
{
	begin(o, 3, "finalize", 4);
	put_str(o, "session_id");
	put_bin(o, id, ID_BYTES);
	return ask(sock, o, -1, 4, "finalized", a);
}

static int copy_to_memfd(const char *path)
{
	static char buffer[1 << 20];
	int from = open(path, O_RDONLY | O_CLOEXEC);
	if (from < 0)
		die(path);
	int memfd = memfd_create("preserve.c", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (memfd < 0)
		die("memfd_create");
	ssize_t got;
	while ((got = read(from, buffer, sizeof buffer)) > 0)
		for (ssize_t put_ = 0, n; put_ < got; put_ += n)
			if ((n = write(memfd, buffer + put_, (size_t)(got - put_))) < 0)
				die("write");
	if (got < 0)
		die(path);
	close(from);
	/* Whoever retrieves it shares the position. */
	if (lseek(memfd, 0, SEEK_SET) < 0)
		die("lseek");
	return memfd;
}

static void print_id(FILE *to, const unsigned char *id)
{
	for (size_t i = 0; i < ID_BYTES; i++)
		fprintf(to, "%02x", id[i]);
	fputc('\n', to);
}

int main(int argc, char **argv)
{
	static struct out o;
	static struct answer a;
	unsigned char id[ID_BYTES];
	int result;

	if (argc != 4) {
		fprintf(stderr, "usage: preserve RUNTIME_DIR SESSION FILE\n");
		return LOCAL_ERROR;
	}
	int memfd = copy_to_memfd(argv[3]);
	if (getrandom(id, sizeof id, 0) != sizeof id)
		die("getrandom");

	int sock = connect_to(argv[1], "serialize");
	if ((result = hello(sock, &o, &a)))
		return tell(result, "hello", &a);
	if ((result = open_session(sock, &o, &a, argv[2], id)))
		return tell(result, "open", &a);
	if ((result = preserve(sock, &o, &a, memfd, argv[3])))
		return tell(result, "preserve", &a);
	if ((result = finalize(sock, &o, &a, id)) == LOST) {
		/* Done or not? The same request on a new connection tells, and does no harm. */
		fprintf(stderr, "finalize: no answer; asking again about the session with id ");
		print_id(stderr, id);
		close(sock);
		sock = connect_to(argv[1], "serialize");
		if ((result = hello(sock, &o, &a)))
			return tell(result, "hello", &a);
		result = finalize(sock, &o, &a, id);
	}
	if (result)
		return tell(result, "finalize", &a);

	/* luod has custody: the memfd lives on when this process exits. */
	print_id(stdout, id);
	return DONE;
}
